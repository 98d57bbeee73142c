"""Which tap of a layer's kernel reads what the shortcut reads (RM.md 3). Offsets in pixels of the fork; nothing is assumed.

Output i, tap t of a shortcut kernel on a grid of step A reads the fork at `A * (s i + d t - p)`. A branch layer on a grid of step B
expresses that tap if it has a tap t' with `B * (d' t' - p') = A * (d t - p)`, and if both read padding for the same outputs.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from rmprune.graph.convolution import Geometry, Pair, output_size, times
from rmprune.graph.obstacle import Obstacle


@dataclass(frozen=True)
class Grid:
    """Where a map lies: its pixels are `step` pixels of the fork apart, and there are `size` of them."""

    step: Pair
    size: Pair


@dataclass(frozen=True)
class Taps:
    """Where a shortcut kernel goes inside a layer's kernel: row indices (kh,), column indices (kw,)."""

    rows: Tensor
    columns: Tensor
    reads_padding: bool


def tap_grid(segment: Geometry, source: Grid, layer: Geometry, wire: Grid, out_size: Pair) -> Taps:
    """The taps of `layer` that do what `segment` does. Raises Obstacle where there are none."""
    (rows, above), (columns, beside) = (_axis(segment, source, layer, wire, out_size[axis], axis) for axis in (0, 1))
    padded = above or beside
    if padded and segment.padding_mode != layer.padding_mode:
        raise Obstacle(f"the shortcut pads with {segment.padding_mode}, the branch with {layer.padding_mode}")
    if padded and layer.padding_mode != "zeros" and (source.size != wire.size or source.step != wire.step):
        raise Obstacle(f"a shortcut kernel that reads {layer.padding_mode} padding on another grid than the branch")
    return Taps(torch.tensor(rows), torch.tensor(columns), padded)


def _axis(
    segment: Geometry, source: Grid, layer: Geometry, wire: Grid, outputs: int, axis: int
) -> tuple[list[int], bool]:
    """Along one axis: the tap of `layer` for each tap of `segment`, and whether any reads padding for one of `outputs` pixels."""
    coarse, fine = source.step[axis], wire.step[axis]
    step = fine * layer.stride[axis]
    wanted = coarse * segment.stride[axis]  # outputs on other pixels are dropped later, by a stride of the branch
    taps, padded = [], False
    for tap in range(segment.kernel[axis]):
        offset = coarse * (segment.dilation[axis] * tap - segment.padding[axis])
        position, rest = divmod(offset, fine)
        index, rest_inside = divmod(position + layer.padding[axis], layer.dilation[axis])
        if rest or rest_inside:
            raise Obstacle("the shortcut samples another grid than the branch")
        if not 0 <= index < layer.kernel[axis]:
            raise Obstacle(f"the {_size(layer.kernel)} kernel of the branch has no tap where the shortcut reads")
        for i in (i for i in range(outputs) if step * i % wanted == 0):
            here = 0 <= layer.stride[axis] * i + position < wire.size[axis]
            there = 0 <= step * i + offset < coarse * source.size[axis]
            if here != there:
                raise Obstacle("the shortcut reads padding where the branch does not")
            padded = padded or not here
        taps.append(index)
    return taps, padded


def _size(pair: Pair) -> str:
    return f"{pair[0]}x{pair[1]}"


@lru_cache(maxsize=4096)
def chain_taps(layers: tuple[Geometry, ...], parts: tuple[Geometry | None, ...], size: Pair) -> tuple[Taps, ...]:
    """The taps of every layer of a branch for its part of the shortcut (None: the identity), on a fork of `size` pixels.

    They must be the same on maps of other sizes, so all remainders of the strides are tried; sizes on which branch and shortcut
    do not fit together are left out. Raises Obstacle where there are no such taps.
    """
    found = _chain(layers, parts, size)
    if found is None:
        raise Obstacle("branch and shortcut end in maps of different sizes")
    period = max(math.prod(layer.stride[axis] for layer in layers) for axis in (0, 1))
    padded = [taps.reads_padding for taps in found]
    for more in range(1, 2 * period + 1):
        other = (size[0] + more, size[1] + more)
        try:
            again = _chain(layers, parts, other)
        except Obstacle as obstacle:
            raise Obstacle(f"{obstacle} on maps of {_size(other)}") from None
        if again is None:
            continue
        padded = [p or taps.reads_padding for p, taps in zip(padded, again, strict=True)]
    return tuple(replace(taps, reads_padding=p) for taps, p in zip(found, padded, strict=True))


def _chain(layers: tuple[Geometry, ...], parts: tuple[Geometry | None, ...], size: Pair) -> tuple[Taps, ...] | None:
    """The taps on this size alone; None where the two ways end in maps of different sizes, or of no size."""
    step, source_step = (1, 1), (1, 1)
    here, there = size, size
    taps = []
    for layer, part in zip(layers, parts, strict=True):
        geometry = part or Geometry(padding_mode=layer.padding_mode)
        out = output_size(layer, here)
        if min(out) < 1:
            return None
        try:
            taps.append(tap_grid(geometry, Grid(source_step, there), layer, Grid(step, here), out))
        except Obstacle:
            if not _end_equal(layers, parts, size):
                return None
            raise
        here, there = out, output_size(geometry, there)
        step, source_step = times(step, layer.stride), times(source_step, geometry.stride)
    if step != source_step:
        raise Obstacle(
            f"the shortcut samples another grid (stride {source_step[0]}) than the branch (stride {step[0]})"
        )
    return tuple(taps)


def _end_equal(layers: tuple[Geometry, ...], parts: tuple[Geometry | None, ...], size: Pair) -> bool:
    """Whether branch and shortcut end in maps of one size."""
    here, there = size, size
    for layer, part in zip(layers, parts, strict=True):
        here, there = output_size(layer, here), output_size(part or Geometry(), there)
    return here == there
