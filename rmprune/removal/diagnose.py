"""What it means that a result is over the tolerance: the tracing, the network itself, the bounds, or a fault. Runs after a failure only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.errors import NotEquivalent, RmpruneError, UnsupportedModel
from rmprune.removal.build import materialise, target_of
from rmprune.removal.check import relative_error
from rmprune.removal.reference import reference_copy
from rmprune.removal.trace import normalise

_COMPARABLE = 0.1  # of the error: then the network's own rounding explains it


@torch.no_grad()
def over_tolerance(
    model: nn.Module, checked: tuple[Tensor, ...], groups: list[int], expected: Any, error: float, tolerance: float,
    calibrated: bool = False,
) -> RmpruneError:  # fmt: skip
    """The error to raise for a result that is off by `error` of the `expected` outputs on the `checked` inputs."""
    twin = reference_copy(model)
    _, traced = materialise(normalise(twin, checked), checked, len(checked[0]), target_of(model), True)
    if not relative_error(expected, traced, groups) <= tolerance:
        return UnsupportedModel(
            "the network does something that torch.fx does not see, such as an in-place operation on a value that has another "
            "name (y = x; y += z); write it out of place"
        )
    said = f"the new network is off by {error:.1e} of the largest output, over the tolerance of {tolerance:.0e}; "
    own = own_rounding(twin, checked, groups, expected)
    if own >= _COMPARABLE * error:
        return NotEquivalent(
            f"{said}the original itself is no more certain: one float64 rounding of its weights changes its output by {own:.1e} "
            "(variances of batch norms near zero do that). Pass a tolerance above it if that is meant"
        )
    if calibrated:
        return NotEquivalent(f"{said}ranges='calibrated' is exact only on inputs like the examples: raise margin")
    return NotEquivalent(f"{said}a fault")


def own_rounding(reference: nn.Module, checked: tuple[Tensor, ...], groups: list[int], expected: Any) -> float:
    """The relative change of the outputs when every weight moves to a neighbouring float64. Changes `reference`."""
    generator = torch.Generator().manual_seed(0)
    for weight in reference.parameters():
        if weight.is_floating_point():
            up = torch.rand(weight.shape, generator=generator) < 0.5
            weight.copy_(torch.nextafter(weight, torch.where(up, math.inf, -math.inf).to(weight)))
    return relative_error(expected, reference(*(x.clone() for x in checked)), groups)
