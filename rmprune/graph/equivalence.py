"""Equivalence of two networks, in float64, on given inputs and on random ones that saturate activations. Rewrites nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from rmprune.errors import NotEquivalent, RmpruneError, UnsupportedModel
from rmprune.graph.build import materialise, target_of
from rmprune.graph.normalise import normalise

SCALES = (1.0, 10.0, 100.0)


def check_inputs(
    example_inputs: tuple[Tensor, ...],
    given: int,
    random: int,
    seed: int = 0,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[tuple[Tensor, ...], list[int]]:
    """Float64 inputs to compare on, and the sizes of their groups: `given` first images, then `random` ones inside `limits`.

    Random images are normal with scales 1, 10 and 100 in turn; the last mixes all scales, pixel by pixel.
    Only inputs of floating point are replaced by random ones.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for value in example_inputs:
        value = value.detach().cpu()
        first = value[:given]
        if not value.is_floating_point():
            inputs.append(torch.cat([first, *[value[:1]] * random]))
            continue
        parts = [first.double()]
        for k in range(random):
            noise = torch.randn(1, *value.shape[1:], generator=generator, dtype=torch.float64)
            scale = torch.tensor(SCALES[k % len(SCALES)], dtype=torch.float64)
            if k == random - 1 and value.dim() == 4:
                scale = torch.tensor(SCALES, dtype=torch.float64)[
                    torch.randint(0, 3, (1, 1, *value.shape[2:]), generator=generator)
                ]
            parts.append((noise * scale).clamp(*limits))
        inputs.append(torch.cat(parts))
    return tuple(inputs), [len(example_inputs[0][:given])] + [1] * random


def relative_error(original: Any, result: Any, groups: list[int]) -> float:
    """max |difference| / max |original|, the largest over groups of images and over outputs. Infinite where shapes differ.

    Where the original itself is not finite nothing is compared, except that it must be finite somewhere.
    """
    first, second = ([t for t in tree_leaves(v) if isinstance(t, Tensor)] for v in (original, result))
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return math.inf
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        sizes = groups if a.dim() and len(a) == sum(groups) else [len(a)] if a.dim() else [1]
        for x, y in zip(
            a.reshape(-1, *a.shape[1:]).split(sizes), b.reshape(-1, *b.shape[1:]).split(sizes), strict=True
        ):
            worst = max(worst, _error(x.double(), y.double()))
    return worst


def _error(original: Tensor, result: Tensor) -> float:
    finite = torch.isfinite(original)
    if not finite.any():
        return 0.0 if original.numel() == 0 else math.inf
    difference = (original - result)[finite].abs().max().item()
    scale = original[finite].abs().max().item()
    if math.isnan(difference):
        return math.inf
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)


_WEIGHT_HOOKS = ("WeightNorm", "SpectralNorm")


def reference_copy(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode on the CPU, without the user's hooks. The argument is left alone."""
    try:
        twin = copy.deepcopy(model).cpu().double().eval()
    except RuntimeError as error:
        raise UnsupportedModel(f"the network cannot be copied: {error}") from error
    return freeze(twin).requires_grad_(False)


def freeze(twin: nn.Module) -> nn.Module:
    """Weights that are computed from others (weight norm, spectral norm, parametrizations) become numbers; hooks go."""
    for module in twin.modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ in _WEIGHT_HOOKS:
                hook(module, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
    for module in list(twin.modules()):
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
            # Not remove_parametrizations: the copy shares its made-up class with the original, which that would damage.
            module.__class__ = type(module).__bases__[0]
            del module._modules["parametrizations"]
            for name, value in values.items():
                setattr(module, name, nn.Parameter(value))
    return twin


def has_hooks(model: nn.Module) -> bool:
    """Whether something listens to, or changes, what a module reads or returns."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(type(hook).__name__ not in _WEIGHT_HOOKS for hook in hooks)


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
