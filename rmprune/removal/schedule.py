"""How one block becomes a plain chain: which layer does which stage of the shortcut, what is reserved, and what it costs.

Every assignment of the shortcut's stages to the branch's layers is tried (both in order), and the cheapest exact one is taken.
"""

from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from rmprune.graph.convolution import Conv, to_measure
from rmprune.graph.fuse import compose
from rmprune.graph.network import spatial
from rmprune.graph.obstacle import Obstacle
from rmprune.graph.ranges import constant, range_of, size_seen
from rmprune.removal.blocks import Block, ShortcutStage
from rmprune.removal.chain import ChainLayer
from rmprune.removal.copies import (
    ANYWHERE,
    Carry,
    Entries,
    Side,
    assemble,
    constant_part,
    diagonal,
    first_copies,
    spread_entries,
)
from rmprune.removal.geometry import Taps, chain_taps
from rmprune.removal.layout import Wire, wires
from rmprune.removal.reserve import Segment, Sweep, reserve

_BOUNDS_HELP = (
    " (a copy takes two channels to pass its activation; with bounds, from ranges='calibrated' or input_range, form='shift' "
    "needs one)"
)


@dataclass(frozen=True)
class Schedule:
    """The plain chain of one block, not yet built: layers with their activations, forms used, channels reserved at most."""

    layers: tuple[ChainLayer, ...]
    forms: frozenset[str]
    reserved: int

    def macs(self) -> int:
        """Multiply-accumulates of the chain for one image."""
        return sum(layer.conv.macs(layer.out_size) for layer in self.layers)


def schedule(block: Block, form: str = "auto") -> Schedule:
    """The cheapest exact plain chain for this block. Raises Obstacle where there is none, with the reason of `form` itself."""
    layout = wires(block.layers)
    needed = _needed(block)
    forms = [form]
    if form == "auto":  # a shift may be what a padded shortcut kernel does not allow
        forms.append("pair")
    if form == "auto" and not all(layer.stock for layer in block.layers):  # no plain chain in any case
        forms.append("slice")
    first: Obstacle | None = None
    for each in forms:
        try:
            return _cheapest(block, layout, needed, each)
        except Obstacle as obstacle:
            first = first or obstacle
    assert first is not None
    raise first


def _cheapest(block: Block, layout: list[Wire], needed: list[Tensor], form: str) -> Schedule:
    """The chain of fewest MACs over all assignments. layout: of the maps between the layers; needed: see `_needed`.

    Raises Obstacle where none is exact, with the reason of the first.
    """
    best: Schedule | None = None
    first: Obstacle | None = None
    # The layer of each stage, in order; everything in the merge comes first.
    for assignment in sorted(combinations_with_replacement(range(len(block.layers)), len(block.stages)), reverse=True):
        if best is not None and _least_macs(block, assignment, needed) >= best.macs():
            continue
        try:
            found = _build(block, assignment, layout, needed, form)
        except Obstacle as obstacle:
            first = first or obstacle
            continue
        if best is None or found.macs() < best.macs():
            best = found
    if best is None:
        assert first is not None
        raise first
    return best


def _least_macs(block: Block, assignment: tuple[int, ...], needed: list[Tensor]) -> int:
    """No schedule with this assignment is cheaper: one copy of every channel that is needed and not constant."""
    ranges = [range_of(block.fork), *[stage.range for stage in block.stages]]
    total, before = 0, 0
    for i, layer in enumerate(block.layers):
        done = sum(at <= i for at in assignment)
        after = 0 if i == len(block.layers) - 1 else int((needed[done] & ~constant(*ranges[done])).sum())
        conv = layer.conv
        taps = conv.geometry.kernel[0] * conv.geometry.kernel[1] * layer.out_size[0] * layer.out_size[1]
        grown = (conv.in_channels + before) * (conv.out_channels + after)
        total += taps * grown if conv.groups == 1 else conv.macs(layer.out_size)
        before = after
    return total


def _needed(block: Block) -> list[Tensor]:
    """needed[j], (channels,) bool: which channels of the value after j stages the merge reads in the end (RM.md 5)."""
    channels = block.stages[-1].conv.out_channels if block.stages else block.layers[0].conv.in_channels
    needed = [torch.ones(channels, dtype=torch.bool)]
    for stage in reversed(block.stages):
        entries = stage.entries
        read = torch.zeros(stage.conv.in_channels, dtype=torch.bool)
        read[entries.columns[needed[0][entries.rows]]] = True
        needed.insert(0, read)
    return needed


def _build(block: Block, assignment: tuple[int, ...], layout: list[Wire], needed: list[Tensor], form: str) -> Schedule:
    """The chain in which layer assignment[j] does stage j of the shortcut. Raises Obstacle where that is not exact."""
    groups = [[s for s, at in zip(block.stages, assignment, strict=True) if at == i] for i in range(len(block.layers))]
    stages = [_as_one(group) for group in groups]
    taps = _taps(block, stages)
    low, high = range_of(block.fork)
    sweep = Sweep(first_copies(low, high, block.layers[0].conv.groups), (low, high), size_seen(block.fork))
    built: list[ChainLayer] = []
    forms: frozenset[str] = frozenset()
    reserved = 0
    for i, layer in enumerate(block.layers):
        value, bias = _value(stages[i], needed[sweep.done], needed[sweep.done + len(groups[i])])
        if taps[i].reads_padding and bool(sweep.carry.constant[value.columns].any()):
            raise Obstacle("a shifted copy would meet zero padding where the shortcut's kernel reads it")
        bias = bias + constant_part(value, sweep.carry, len(bias))
        sweep.done += len(groups[i])
        if groups[i]:
            sweep.range, sweep.seen = groups[i][-1].range, groups[i][-1].seen
        segment = Segment(value, bias, taps[i], needed[sweep.done], stages[i] is None)
        if i == len(block.layers) - 1:
            return Schedule((*built, _merge(layer, sweep.carry, segment)), forms, reserved)
        pairs = _merge_pairs(block, stages[-1]) if layout[i].interleaved and not any(groups[i + 1 : -1]) else None
        try:
            new, sweep.carry, used = reserve(layer, sweep, segment, layout[i], form, pairs)
        except Obstacle as obstacle:
            more = _BOUNDS_HELP if "pair" in forms and layer.conv.groups > 1 else ""
            raise Obstacle(f"{obstacle}{more}") from None
        built.append(new)
        forms |= used
        reserved = max(reserved, len(sweep.carry.channel))
    raise AssertionError("a block has at least one layer")


def _as_one(stages: list[ShortcutStage]) -> ShortcutStage | None:
    """Several stages as one folded one; None for none. Raises Obstacle where their product is no kernel."""
    if len(stages) <= 1:
        return stages[0] if stages else None
    product: Conv | None = stages[0].folded
    for stage in stages[1:]:
        product = None if product is None else compose(product, stage.folded)
    if product is None:
        raise Obstacle("its shortcut's stages do not multiply exactly")
    return ShortcutStage(product, stages[0].size, stages[-1].range)


def _taps(block: Block, stages: list[ShortcutStage | None]) -> tuple[Taps, ...]:
    """Where each layer's part of the shortcut goes in its kernel; the same on maps of every size."""
    layers = tuple(layer.conv.geometry for layer in block.layers)
    parts = tuple(None if stage is None else stage.conv.geometry for stage in stages)
    return chain_taps(layers, parts, spatial(block.fork))


def _value(stage: ShortcutStage | None, needed: Tensor, needed_after: Tensor) -> tuple[Entries, Tensor]:
    """The kernel (K', K) from the carried value to the next one, only where it is needed, and its bias (K',).

    needed: (K,) bool, of the carried value; needed_after: (K',) bool.
    """
    if stage is None:
        return diagonal(needed.nonzero().flatten()), torch.zeros(len(needed), dtype=torch.float64)
    entries = stage.entries
    used = needed_after[entries.rows]
    if not used.all():
        entries = Entries(entries.rows[used], entries.columns[used], entries.kernel[used])
    return entries, stage.folded.bias


def _merge(layer: ChainLayer, carry: Carry, segment: Segment) -> ChainLayer:
    """The last layer, which adds the shortcut's value up."""
    conv, channels = layer.conv, layer.conv.out_channels
    group = torch.full((channels,), ANYWHERE)
    if conv.groups > 1:
        group = torch.arange(channels) // (channels // conv.groups)
    entries = spread_entries(segment.value, group, carry)
    extra = Entries(entries.rows, carry.position[entries.columns], entries.kernel)
    merged = assemble(
        conv.folded(), carry.side, Side(torch.arange(channels), channels), conv.groups, extra, segment.taps
    )
    norm = to_measure(channels, conv.norm)
    return replace(layer, conv=replace(merged, bias=merged.bias + segment.bias, norm=norm))


def _merge_pairs(block: Block, stage: ShortcutStage | None) -> tuple[Tensor, Tensor]:
    """The (channel, group) pairs, (P,) each, that the groups of the last layer read."""
    conv = block.layers[-1].conv
    if stage is None:
        rows = columns = torch.arange(conv.out_channels)
    else:
        entries = stage.entries
        rows, columns = entries.rows, entries.columns
    pairs = torch.unique(torch.stack([columns, rows // (conv.out_channels // conv.groups)]), dim=1)
    return pairs[0], pairs[1]
