"""Taylor scores summed up during ordinary training, and the sums that every criterion shares. No pass of its own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rmprune.pruning.structure import Member, Structure, weight_of

Scores = dict[str, Tensor]
"""Group name -> float64 [units]."""


class TaylorSum:
    """Taylor scores from the gradients that ordinary training leaves behind: call :meth:`update` after backward, no
    extra pass.

    The effect of removing input channel c of a layer is sum(W[:, c] * dL/dW[:, c]), which equals sum(activation *
    gradient); behind a batch norm and ReLU it is the producer's gamma * dL/dgamma + beta * dL/dbeta. |effect of the
    batch|, summed over batches.
    """

    def __init__(self, structure: Structure) -> None:
        self.reset(structure)

    def reset(self, structure: Structure, scores: Mapping[str, Tensor] | None = None) -> None:
        """Start over for this structure, from ``scores`` where given."""
        self.structure = structure
        self.scores = (
            zero_scores(structure) if scores is None else {n: scores[n].double().clone() for n in structure.units}
        )
        self.index = {(g.name, m.layer): m.index for g in structure.groups for m in g.consumers}

    def shrink(self, keep: Mapping[str, Tensor]) -> None:
        """Follow a cut: what stays keeps its score."""
        scores = {n: s[keep[n].to(s.device)] if n in keep else s for n, s in self.scores.items()}
        self.reset(self.structure.shrunk(keep), scores)

    def scale(self, factor: float) -> None:
        """Let the past count less."""
        for score in self.scores.values():
            score *= factor

    @torch.no_grad()
    def update(self, model: nn.Module) -> bool:
        """Add this step's gradients; False, and nothing added, where a consumer has none."""
        effects: dict[str, Tensor] = {}
        for name in {m.layer for g in self.structure.groups for m in g.consumers}:
            weight = weight_of(model, name)
            if weight.grad is None:
                return False
            effects[name] = input_weights(model.get_submodule(name), weight.detach() * weight.grad).double()
        for group in self.structure.groups:
            parts = []
            for member in group.consumers:
                effect, key = effects[member.layer], (group.name, member.layer)
                if self.index[key].device != effect.device:
                    self.index[key] = self.index[key].to(effect.device)
                parts.append(effect[self.index[key]].sum(1))
            score = self.scores[group.name].to(parts[0].device)
            self.scores[group.name] = score + torch.stack(parts).sum(0).abs()
        return True


def input_weights(module: nn.Module, values: Tensor) -> Tensor:
    """[c_in]: the sum, for each input channel, of ``values`` shaped as the layer's weight (convolution groups taken
    apart).
    """
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return values.view(module.groups, -1, *values.shape[1:]).sum(dim=(1, 3, 4)).flatten()
    return values.sum(dim=(0, 2, 3)) if values.dim() > 2 else values.sum(0)


def gather(values: Tensor, member: Member) -> Tensor:
    """[units, k] of a vector over the channels of the member's layer."""
    return values.double().cpu()[member.index]


def zero_scores(structure: Structure) -> Scores:
    return {g.name: torch.zeros(g.units, dtype=torch.float64) for g in structure.groups}
