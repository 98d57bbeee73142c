"""Equivalence of two networks, in float64, on given inputs and on random ones that saturate activations. Rewrites nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

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
