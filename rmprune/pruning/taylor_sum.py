"""Taylor scores from the gradients that training leaves behind. Those that are measured on images are importance.py's business."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.pruning.groups import Structure, zero_scores
from rmprune.pruning.layers import by_input, by_output


class TaylorSum:
    """Taylor scores from the gradients that ordinary training leaves behind: call `update` after backward, no
    extra pass.

    The effect of removing input channel c of a layer is sum(W[:, c] * dL/dW[:, c]), which equals sum(activation *
    gradient); behind a batch norm and ReLU it is the producer's gamma * dL/dgamma + beta * dL/dbeta. Of outputs that meet others in a
    product it is that of their own weights and bias. |effect of the batch|, summed over batches.
    """

    def __init__(self, structure: Structure) -> None:
        self.reset(structure)

    def reset(self, structure: Structure, scores: Mapping[str, Tensor] | None = None) -> None:
        """Start over for this structure, from `scores` where given.

        unseen: the groups whose readers have had no gradient since the start; a score of 0 would say that they do not matter.
        """
        self.structure = structure
        self.unseen = set(structure.units) if scores is None else set()
        self.scores = (
            zero_scores(structure) if scores is None else {n: scores[n].double().clone() for n in structure.units}
        )
        self.index = {(g.name, m.layer, m.side): m.index for g in structure.groups for m in g.readers}

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
        """Add this step's gradients; False, and nothing added, where no reader has one, where one is frozen, or has one that is not
        finite: a GradScaler, which skips such steps, begins with a few. A reader that the loss did not go through (a block skipped at
        random) has the effect 0."""
        sides = {(m.layer, m.side) for g in self.structure.groups for m in g.readers}
        layers = {name: model.get_submodule(name) for name, _ in sides}
        if any(is_frozen(layer) for layer in layers.values()) or all(
            layer.weight.grad is None for layer in layers.values()
        ):
            return False
        effects = {(name, side): _effect(layers[name], side).double() for name, side in sides}
        if (
            effects and not torch.cat([effect.sum().view(1) for effect in effects.values()]).isfinite().all()
        ):  # one wait for a GPU
            return False
        for group in self.structure.groups:
            parts = []
            if any(layers[member.layer].weight.grad is not None for member in group.readers):
                self.unseen.discard(group.name)
            for member in group.readers:
                effect, key = effects[member.layer, member.side], (group.name, member.layer, member.side)
                if self.index[key].device != effect.device:
                    self.index[key] = self.index[key].to(effect.device)
                parts.append(effect[self.index[key]].sum(1))
            score = self.scores[group.name].to(parts[0].device)
            self.scores[group.name] = score + torch.stack(parts).sum(0).abs()
        return True


def is_frozen(layer: nn.Module) -> bool:
    """Whether the weight of this layer gets no gradient, whatever the loss is."""
    return not isinstance(layer.weight, Tensor) or not layer.weight.requires_grad


def _effect(layer: nn.Module, side: str) -> Tensor:
    """[channels]: the sum of parameter * gradient over the weights that read each channel ("in"), or over what makes each output."""
    used: list[Any] = [layer.weight, layer.bias] if side == "zero" and layer.bias is not None else [layer.weight]
    moved, *shift = (tensor.detach() * (0.0 if tensor.grad is None else tensor.grad) for tensor in used)
    rows = by_output(layer, moved)
    return by_input(layer, rows) if side == "in" else sum(shift, rows.reshape(len(rows), -1).sum(1))
