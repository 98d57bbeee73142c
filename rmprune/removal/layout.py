"""Where reserved channels lie in the maps of a chain: behind the computed ones, in groups of their own, or woven into theirs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rmprune.graph.obstacle import Obstacle
from rmprune.graph.ranges import Range
from rmprune.removal.chain import ChainLayer


@dataclass(frozen=True)
class Wire:
    """How the map after layer i is laid out.

    interleaved: 0, or the number of groups that each hold some computed channels and then their reserved ones.
    lanes, width: reserved channels otherwise follow the computed ones, `lanes` of them in each extra group of `width` channels.
    """

    interleaved: int = 0
    lanes: int = 1
    width: int = 1


@dataclass(frozen=True)
class Layout:
    """Positions of the computed (C,) and the reserved (R,) channels in a map of `total` channels; the rest is filled with zeros."""

    computed: Tensor
    reserved: Tensor
    total: int
    extra_groups: int = 0

    def spread(self, own: Range, copies: Range) -> Range:
        """The range of the whole map, (total,) each end, from those of its computed and of its reserved channels."""
        low, high = torch.zeros(2, self.total, dtype=torch.float64)
        for end, mine, copied in zip((low, high), own, copies, strict=True):
            end[self.computed], end[self.reserved] = mine, copied
        return low, high


def wires(layers: tuple[ChainLayer, ...]) -> list[Wire]:
    """The layout of the maps between the layers. Raises Obstacle where the groups do not fit together."""
    groups = [layer.conv.groups for layer in layers]
    inside: list[Wire] = []
    runs = _interleaved_runs(groups)
    for i in range(len(layers) - 1):
        number = max(runs[i], runs[i + 1])
        if number:
            inside.append(Wire(number))
            continue
        sides = [_extra(layers[i], out=True)] if groups[i] > 1 else []
        sides += [_extra(layers[i + 1], out=False)] if groups[i + 1] > 1 else []
        if len(set(sides)) > 1:
            raise Obstacle("two grouped convolutions of different group widths in a row")
        inside.append(Wire(0, *sides[0]) if sides else Wire())
    return inside


def _extra(layer: ChainLayer, out: bool) -> tuple[int, int]:
    """Lanes and width of an extra group on one side of a grouped layer that stands in the middle of a chain."""
    narrow, wide = layer.conv.in_channels // layer.conv.groups, layer.conv.out_channels // layer.conv.groups
    return min(narrow, wide), wide if out else narrow


def _interleaved_runs(groups: list[int]) -> list[int]:
    """For each layer the number of groups of its run, if the run of grouped layers touches the first or the last layer."""
    runs = [0] * len(groups)
    start = 0
    while start < len(groups):
        end = start
        while end < len(groups) and groups[end] > 1:
            end += 1
        if end > start and (start == 0 or end == len(groups)) and len(groups) > 1:
            if len(set(groups[start:end])) > 1:
                raise Obstacle("grouped convolutions in a row with different numbers of groups")
            runs[start:end] = groups[start:end]
        start = max(end, start + 1)
    return runs


def lay_out(wire: Wire, computed: int, group: Tensor, extra_groups: int | None = None) -> Layout:
    """Places `len(group)` reserved channels beside `computed` ones. group: (R,) the group each must lie in, or ANYWHERE.

    extra_groups: the number that the layer before already has; more cannot be made after it.
    """
    count = len(group)
    if wire.interleaved:
        return _interleave(wire.interleaved, computed, group)
    needed = -(-count // wire.lanes)
    if extra_groups is not None and needed > extra_groups:
        raise Obstacle("a grouped convolution would have to emit more copies than it is given")
    extra = needed if extra_groups is None else extra_groups
    index = torch.arange(count)
    reserved = computed + index // wire.lanes * wire.width + index % wire.lanes
    return Layout(torch.arange(computed), reserved, computed + extra * wire.width, extra)


def _interleave(groups: int, computed: int, group: Tensor) -> Layout:
    """In each group first its computed channels, then the reserved ones that lie in it by `group` (R,)."""
    own = computed // groups
    counts = torch.bincount(group, minlength=groups)
    width = own + (int(counts.max()) if len(group) else 0)
    index = torch.arange(computed)
    order = torch.argsort(group, stable=True)
    starts = torch.cumsum(counts, 0) - counts
    lane = torch.empty_like(group)
    lane[order] = torch.arange(len(group)) - starts[group[order]]
    return Layout(index // own * width + index % own, group * width + own + lane, groups * width)
