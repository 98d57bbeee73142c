"""What one change of a network costs at its end, measured on training images: a block that is merged or dropped, a group made narrow.

What is assumed: that the changes of several parts add up. They do not, quite (a later layer makes up for an earlier one, or two losses
meet in one map), so a sum of them only ranks plans; the best are carried out and judged as whole networks.
`experiments/plan_surrogate.py` compares the two. A block is judged with the ends of the next blocks fitted (`shorten_each`), as in
whole plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmprune.graph.run import evaluating, on_copies
from rmprune.graph.tensors import device_of
from rmprune.pruning.allocate import keep_best
from rmprune.pruning.calibration import Calibrator, Cut, Fitting
from rmprune.pruning.carry_out import Examples, collapse_images
from rmprune.pruning.collapse import shorten_each
from rmprune.pruning.groups import Scores, Structure
from rmprune.pruning.plan import Choice, Options
from rmprune.pruning.program import read_program
from rmprune.runs.progress import progress

_SAMPLES = 1 << 12  # positions that each layer is fitted on
# Layers fitted behind a group that is made narrow: what is left of its error then is not made up for further on.
_BEHIND = 4
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
        return self.divergence(said), float(F.nll_loss(said, self.labels))

    def divergence(self, logits: Tensor) -> float:
        """KL divergence of these outputs [N, classes] for the images from what the original says, in nats."""
        said = F.log_softmax(logits.double().cpu(), 1)
        return max(float(F.kl_div(said, self.said, reduction="batchmean", log_target=True)), 0.0)


@torch.no_grad()
def _said(network: nn.Module, images: Tensor) -> Tensor:
    with evaluating(network):
        device = device_of(network)
        return torch.cat(
            [F.log_softmax(on_copies(network, x.to(device)).double(), 1) for x in images.split(_BATCH)]
        ).cpu()


def block_losses(
    model: nn.Module, options: Options, examples: Examples, ends: Ends, tell: Callable[[str], None] = lambda _: None
) -> dict[str, dict[Choice, float]]:
    """{block: {choice: KL}} of every block that is merged or dropped, alone and fitted; what is kept, removed or fused changes nothing."""
    exact: tuple[Choice, ...] = ("keep", "remove", "fuse")
    shorter: tuple[Choice, ...] = ("merge", "drop")
    found = {name: {choice: 0.0 for choice in (*exact, *shorter) if not own[choice]} for name, own in options.items()}
    ways = [(name, choice) for name, own in found.items() for choice in shorter if choice in own]
    with progress("blocks merged or dropped", len(ways)) as advance:
        each = [{name: choice == "drop"} for name, choice in ways]
        for number, shortened in shorten_each(model, collapse_images(examples), each):
            name, choice = ways[number]
            found[name][choice] = ends.change(shortened.model)[0]
            tell(f"{name}: {choice} {found[name][choice]:.3g}")
            advance(1)
    return found


@torch.no_grad()
def width_losses(
    model: nn.Module, structure: Structure, scores: Scores, widths: Mapping[str, Sequence[int]], ends: Ends
) -> dict[str, list[float]]:
    """{group: KL at each of its `widths`, units that stay, ascending}: that group alone so narrow, its best-scored units kept, and what
    reads it and a few layers behind fitted by least squares, as in `rmprune.pruning.refit`.

    Measured at the least of `widths` and a third of the way up; elsewhere its root is interpolated (KL goes with the square of an
    error), and it never falls with fewer units. Raises UnsupportedModel where layers cannot be fitted.
    """
    points = {
        (group.name, units): keep_best(scores[group.name], units)
        for group in structure.groups
        for units in _measured(widths[group.name], group.units)
    }
    calibrator = Calibrator(model, structure, Fitting(samples=_SAMPLES))
    program = read_program(model, structure, ends.images[:2]).unshared()
    x = calibrator.ready(ends.images)
    calibrator.measure_reference(program, x)
    cuts = {(name, units): Cut.of(calibrator.model, structure, {name: keep}) for (name, units), keep in points.items()}
    found = {}
    with progress("groups made narrow", len(cuts)) as advance:
        for key, logits in calibrator.outcomes(program, x, cuts, _BEHIND):
            found[key] = ends.divergence(logits)
            advance(1)
    return {
        g.name: _curve({u: kl for (n, u), kl in found.items() if n == g.name}, g.units, widths[g.name])
        for g in structure.groups
    }


def _measured(widths: Sequence[int], whole: int) -> list[int]:
    third = widths[0] + (widths[-1] - widths[0]) / 3
    return sorted({widths[0], min(widths, key=lambda width: abs(width - third))} - {whole}, reverse=True)


def _curve(found: Mapping[int, float], whole: int, widths: Sequence[int]) -> list[float]:
    points = {whole: 0.0}
    for units in sorted(found, reverse=True):
        points[units] = max(found[units], *points.values())
    known = sorted(points)
    return np.square(np.interp(widths, known, [points[units] ** 0.5 for units in known])).tolist()
