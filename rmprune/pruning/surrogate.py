"""What one change of a network costs at its end, measured on training images: a block that is merged or dropped, a group made narrow.

What is assumed: that the changes of several parts add up. They do not, quite (a later layer makes up for an earlier one, or two losses
meet in one map), so a sum of them only ranks plans; the best are carried out and judged as whole networks.
`experiments/plan_surrogate.py` compares the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmprune.pruning.allocate import keep_best
from rmprune.pruning.carry_out import Examples, collapse_images
from rmprune.pruning.collapse import shorten_blocks
from rmprune.pruning.groups import Group, Scores, Structure, device_of, evaluating
from rmprune.pruning.plan import Choice, Options

_RIDGE = 1e-3  # relative to the mean variance of what a layer reads
_BATCH = 128


@dataclass(frozen=True)
class Ends:
    """Training images, and what the original says of them: log-probabilities [N, classes]."""

    images: Tensor
    labels: Tensor
    said: Tensor

    @classmethod
    def of(cls, original: nn.Module, images: Tensor, labels: Tensor) -> Ends:
        """With what `original`, in eval mode, says of these images [N, C, H, W] with labels [N]."""
        return cls(images, labels, _said(original, images))

    def change(self, network: nn.Module) -> tuple[float, float]:
        """(KL divergence of what `network` says from what the original says, cross-entropy): means over the images, in nats."""
        said = _said(network, self.images)
        kl = F.kl_div(said, self.said, reduction="batchmean", log_target=True)
        return max(float(kl), 0.0), float(F.nll_loss(said, self.labels))


@torch.no_grad()
def _said(network: nn.Module, images: Tensor) -> Tensor:
    with evaluating(network):
        device = device_of(network)
        return torch.cat([F.log_softmax(network(x.to(device)).double(), 1) for x in images.split(_BATCH)]).cpu()


def block_losses(
    model: nn.Module, options: Options, examples: Examples, ends: Ends, tell: Callable[[str], None] = lambda _: None
) -> dict[str, dict[Choice, float]]:
    """{block: {choice: KL}} of every block that is merged or dropped, alone and fitted; what is kept or removed changes nothing."""
    found: dict[str, dict[Choice, float]] = {}
    images = collapse_images(examples)
    for name, own in options.items():
        exact: tuple[Choice, ...] = ("keep", "remove")
        found[name] = {choice: 0.0 for choice in exact if not own[choice]}
        if not own["merge"]:
            found[name]["merge"] = ends.change(shorten_blocks(model, images, collapse=[name]).model)[0]
        if not own["drop"]:
            found[name]["drop"] = ends.change(shorten_blocks(model, images, drop=[name]).model)[0]
        tell(f"{name}: " + ", ".join(f"{choice} {kl:.3g}" for choice, kl in found[name].items()))
    return found


def width_losses(
    model: nn.Module, structure: Structure, scores: Scores, widths: Mapping[str, Sequence[int]], ends: Ends
) -> dict[str, list[float]]:
    """{group: KL at each of its `widths`, units that stay, ascending}: that group alone made so narrow, its best-scored units kept.

    What goes is regressed on what stays, pixel by pixel, and its share given to the layers that read it: a fit without running the
    network again. At a few of the widths that is measured; between them KL is interpolated, and never falls with fewer units.
    """
    moments = _moments(model, structure, ends.images)
    return {g.name: _curve(model, g, scores[g.name], widths[g.name], moments, ends) for g in structure.groups}


def _curve(
    model: nn.Module, group: Group, scores: Tensor, widths: Sequence[int], moments: Mapping[str, Moments], ends: Ends
) -> list[float]:
    """Measured at the ends of `widths` and two between; the mean of what goes is given to its readers in any case."""
    points = {group.units: 0.0}
    for units in sorted({widths[i * (len(widths) - 1) // 3] for i in range(4)} - {group.units}, reverse=True):
        with _narrowed(model, group, keep_best(scores.double().cpu(), units), moments):
            points[units] = max(ends.change(model)[0], *points.values())
    known = sorted(points)
    return np.square(
        np.interp(widths, known, [points[u] ** 0.5 for u in known])
    ).tolist()  # KL goes with the error's square


@dataclass(frozen=True)
class Moments:
    """Mean [C] and covariance [C, C] of what a layer reads, over images and positions, in float64."""

    mean: Tensor
    covariance: Tensor


@torch.no_grad()
def _moments(model: nn.Module, structure: Structure, images: Tensor) -> dict[str, Moments]:
    sums: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].transpose(0, 1).flatten(1) if inputs[0].dim() == 4 else inputs[0].flatten(0, -2).T
            own = [
                torch.tensor(float(rows.shape[1]), device=rows.device),
                rows.sum(1).double(),
                (rows @ rows.T).double(),
            ]
            sums[name] = own if name not in sums else [a + b for a, b in zip(sums[name], own, strict=True)]

        return hook

    readers = {member.layer for group in structure.groups for member in group.consumers}
    with contextlib.ExitStack() as stack, evaluating(model):
        for name in readers:
            handle = model.get_submodule(name).register_forward_pre_hook(note(name))
            stack.callback(handle.remove)
        for x in images.split(_BATCH):
            model(x.to(device_of(model)))
    found = {}
    for name, (count, total, square) in sums.items():
        mean = total / count
        found[name] = Moments(mean, square / count - torch.outer(mean, mean))
    return found


@contextlib.contextmanager
def _narrowed(model: nn.Module, group: Group, keep: Tensor, moments: Mapping[str, Moments]) -> Iterator[None]:
    """`model` as if the units of `group` whose mask is False were gone, their readers fitted; all is put back."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        for member in group.consumers:
            gone = torch.zeros(member.size, dtype=torch.bool)
            gone[member.index[~keep].flatten()] = True
            layer = model.get_submodule(member.layer)
            before = layer.weight.detach().clone()  # type: ignore[operator]
            weight, shift = _without(before.double(), gone, moments[member.layer], getattr(layer, "groups", 1))
            layer.weight.copy_(weight)  # type: ignore[operator]
            stack.callback(_put_back, layer, before)
            handle = layer.register_forward_hook(_adding(shift.to(before)))
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def _put_back(layer: nn.Module, weight: Tensor) -> None:
    layer.weight.copy_(weight)  # type: ignore[operator]


def _adding(shift: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (shift[:, None, None] if isinstance(module, nn.Conv2d) else shift)

    return hook


def _without(weight: Tensor, gone: Tensor, moments: Moments, groups: int) -> tuple[Tensor, Tensor]:
    """(weight [out, in / groups, ...] with zeros where it read what is gone, shift [out]).

    x_gone is taken for A x_kept + b with A = C_gk (C_kk + ridge)^-1, b = m_g - A m_k: exact in the interior of a map.
    """
    result, shift = weight.clone(), weight.new_zeros(len(weight))
    inputs, outputs = len(gone) // groups, len(weight) // groups
    for group in range(groups):
        channels = torch.arange(group * inputs, (group + 1) * inputs)
        rows = slice(group * outputs, (group + 1) * outputs)
        out, stay = gone[channels].nonzero().flatten(), (~gone[channels]).nonzero().flatten()
        mean, covariance = moments.mean[channels], moments.covariance[channels][:, channels]
        own = covariance[stay][:, stay]
        ridge = _RIDGE * covariance.diagonal().mean().clamp(min=1e-30)
        share = torch.linalg.solve(own + ridge * torch.eye(len(stay)).to(own), covariance[stay][:, out])  # [kept, gone]
        part = weight[rows].flatten(2) if weight.dim() > 2 else weight[rows][:, :, None]
        moved = part.clone()
        moved[:, stay] += torch.einsum("ogt,kg->okt", part[:, out], share)
        moved[:, out] = 0
        result[rows] = moved.view_as(weight[rows])
        shift[rows] = part[:, out].sum(2) @ (mean[out] - share.T @ mean[stay])
    return result, shift
