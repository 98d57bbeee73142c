"""Inputs to compare two networks on, and how far their outputs are apart, relative to what the inputs change in them. Runs no network."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmprune.graph.tensors import tensors_in

SCALES = (1.0, 10.0, 100.0)


def comparison_inputs(
    example_inputs: tuple[Tensor, ...], given: int, random: int, seed: int = 0,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[tuple[Tensor, ...], list[int]]:  # fmt: skip
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


FLOOR = 1e-3  # of the largest |output|: the rounding of float64 goes with that
HARDLY = 1e-9  # of it: what the inputs change no more than so is told from rounding no longer (to 1e-4 at the usual tolerance)


def comparison_base(
    example_inputs: tuple[Tensor, ...], limits: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[Tensor, ...]:
    """One more random image of scale 1, in float64: what the outputs on the checked images are told from."""
    return tuple(x[:1] for x in comparison_inputs(example_inputs, 0, 2, seed=1, limits=limits)[0])


def relative_error(original: Any, result: Any, groups: list[int], base: Any = None) -> float:
    """max |difference| / what the inputs change, the largest over groups of images and over outputs. Infinite where shapes differ.

    What the inputs change in a group, for each output tensor: max - min over the group's images and `base` (the original's outputs
    on one other image), at the entry where that is largest, so that a bias does not count (RM.md 10). At least FLOOR of the
    largest |output|, since float64 rounding goes with that; and the largest itself where there is nothing to tell the image from.
    Where either is not finite the other must be the same (a mask's -inf, NaN); the original must be finite somewhere.
    """
    first, second = double_tensors(original), double_tensors(result)
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return math.inf
    worst = 0.0
    for a, b, other in zip(first, second, _others(first, base), strict=True):
        for x, y in zip(_parts(a, groups), _parts(b, groups), strict=True):
            worst = max(worst, _error(x, y, _change(x, other)))
    return worst


def hardly_depends(original: Any, groups: list[int], base: Any) -> bool:
    """Whether the inputs change some output tensor by no more than HARDLY of its largest |entry|, in every group of images."""
    tensors = double_tensors(original)
    pairs = [(_parts(tensor, groups), other) for tensor, other in zip(tensors, _others(tensors, base), strict=True)]
    return any(not any(depends(part, other) for part in parts) for parts, other in pairs)


@dataclass(frozen=True)
class Comparison:
    """What another network is compared on, and what the original gives for it.

    inputs, groups: see `comparison_inputs`; expected: the original's outputs for them. base_inputs: see `comparison_base`; base: the
    original's outputs for those, None where there are none.
    """

    inputs: tuple[Tensor, ...]
    groups: list[int]
    expected: Any
    base_inputs: tuple[Tensor, ...] = ()
    base: Any = None

    def error(self, found: Any) -> float:
        """The `relative_error` of the other network's outputs."""
        return relative_error(self.expected, found, self.groups, self.base)

    @property
    def hardly_depends(self) -> bool:
        """Whether the outputs say little of the inputs: see the function of this name."""
        return hardly_depends(self.expected, self.groups, self.base)


def depends(part: Tensor, other: Tensor | None) -> bool:
    """Whether the images of a group [images, entries], and `other` beside them, are told apart by more than HARDLY of the largest entry."""
    return _change(part, other) > HARDLY * _largest(part)


def double_tensors(value: Any) -> list[Tensor]:
    """The tensors in what a network returns, in float64 on the CPU; of a complex one real and imaginary parts [..., 2]."""
    found = (t.detach().cpu() for t in tensors_in(value))
    return [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).double() for t in found]


def _others(tensors: list[Tensor], base: Any) -> list[Tensor] | list[None]:
    others = double_tensors(base)
    return others if len(others) == len(tensors) else [None] * len(tensors)


def _parts(tensor: Tensor, groups: list[int]) -> tuple[Tensor, ...]:
    """The groups, (images, entries) each; one of one image where the tensor does not hold image after image."""
    if tensor.dim() == 0 or tensor.numel() == 0 or len(tensor) % sum(groups):
        return (tensor.reshape(1, -1),)
    return tensor.reshape(sum(groups), -1).split(groups)


def _change(part: Tensor, other: Tensor | None) -> float:
    """max over entries of max - min over images; infinite where no entry is finite in two of them."""
    if other is not None and other.numel() == part.shape[1]:
        part = torch.cat([part, other.reshape(1, -1)])
    finite = torch.isfinite(part)
    entries = finite.sum(0) > 1
    if not entries.any():
        return math.inf
    low, high = torch.where(finite, part, math.inf).amin(0), torch.where(finite, part, -math.inf).amax(0)
    return (high - low)[entries].max().item()


def _largest(part: Tensor) -> float:
    return part[torch.isfinite(part)].abs().max().item() if torch.isfinite(part).any() else 0.0


def _error(original: Tensor, result: Tensor, change: float) -> float:
    finite = torch.isfinite(original)
    if not finite.any():
        return 0.0 if original.numel() == 0 else math.inf
    odd = ~(finite & torch.isfinite(result))
    if not torch.allclose(original[odd], result[odd], 0, 0, equal_nan=True):
        return math.inf
    difference = (original - result)[finite].abs().max().item()
    largest = _largest(original)
    scale = min(largest, change) if math.isinf(change) else max(change, FLOOR * largest)
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
