"""How one block becomes a plain chain: which layer does which stage of the shortcut, what is reserved, and what it costs.

Every assignment of the shortcut's stages to the branch's layers is tried (both in order), and the cheapest exact one is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from rmprune.removal.activations import Rule, rule_of
from rmprune.removal.assemble import Entries, Side, assemble, diagonal, join, spread_norm
from rmprune.removal.blocks import Block, Layer, Stage
from rmprune.removal.carry import (
    Carry,
    after_activation,
    constant_part,
    new_rows,
    passes_as_is,
    row_entries,
    spread_entries,
    start,
)
from rmprune.removal.encode import constant, encode, free
from rmprune.removal.geometry import Taps, chain_taps
from rmprune.removal.kernels import Conv, compose, to_measure
from rmprune.removal.layout import ANYWHERE, Wire, lay_out, wires
from rmprune.removal.observe import size_seen
from rmprune.removal.ranges import Range, range_of, spatial


@dataclass(frozen=True)
class Schedule:
    """The plain chain of one block, not yet built: layers with their activations, forms used, channels reserved at most."""

    layers: tuple[Layer, ...]
    forms: frozenset[str]
    reserved: int

    def macs(self) -> int:
        return sum(layer.conv.macs(layer.out_size) for layer in self.layers)

    def params(self) -> int:
        return sum(layer.conv.params() for layer in self.layers)


@dataclass
class _State:
    """Where the sweep along the branch stands: what is carried, its range, and how many stages of the shortcut it has behind it."""

    carry: Carry
    range: Range
    seen: float
    done: int = 0


def schedule(block: Block, form: str = "auto") -> Schedule | str:
    """The cheapest exact plain chain for this block, or the reason why there is none."""
    layout = wires(block.layers)
    if isinstance(layout, str):
        return layout
    needed = _needed(block)
    best, reasons = _cheapest(block, layout, needed, form)
    if best is None and form == "auto":  # a shift may be what a padded shortcut kernel does not allow
        best, _ = _cheapest(block, layout, needed, "pair")
    return best if best is not None else reasons[0]


def _cheapest(block: Block, layout: list[Wire], needed: list[Tensor], form: str) -> tuple[Schedule | None, list[str]]:
    best: Schedule | None = None
    reasons: list[str] = []
    for assignment in _assignments(len(block.stages), len(block.layers)):
        if best is not None and _least_macs(block, assignment, needed) >= best.macs():
            continue
        found = _build(block, assignment, layout, needed, form)
        if isinstance(found, str):
            reasons.append(found)
        elif best is None or found.macs() < best.macs():
            best = found
    return best, reasons


def _assignments(stages: int, layers: int) -> Iterator[tuple[int, ...]]:
    """The layer of each stage, in order; everything in the merge comes first."""
    yield from sorted(combinations_with_replacement(range(layers), stages), reverse=True)


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
    """needed[j]: which channels of the value after j stages the merge reads in the end (RM.md 5)."""
    channels = block.stages[-1].conv.out_channels if block.stages else block.layers[0].conv.in_channels
    needed = [torch.ones(channels, dtype=torch.bool)]
    for stage in reversed(block.stages):
        entries = stage.entries
        read = torch.zeros(stage.conv.in_channels, dtype=torch.bool)
        read[entries.columns[needed[0][entries.rows]]] = True
        needed.insert(0, read)
    return needed


def _build(
    block: Block, assignment: tuple[int, ...], layout: list[Wire], needed: list[Tensor], form: str
) -> Schedule | str:
    groups = [[s for s, at in zip(block.stages, assignment, strict=True) if at == i] for i in range(len(block.layers))]
    segments: list[Stage | None] = []
    for group in groups:
        segment = _segment(group)
        if isinstance(segment, str):
            return segment
        segments.append(segment)
    taps = _taps(block, segments)
    if isinstance(taps, str):
        return taps
    low, high = range_of(block.fork)
    state = _State(start(low, high, block.layers[0].conv.groups), (low, high), size_seen(block.fork))
    built: list[Layer] = []
    forms: frozenset[str] = frozenset()
    reserved = 0
    for i, layer in enumerate(block.layers):
        value, bias = _value(segments[i], needed[state.done], needed[state.done + len(groups[i])])
        if taps[i].reads_padding and bool(state.carry.constant[value.columns].any()):
            return "a shifted copy would meet zero padding where the shortcut's kernel reads it"
        bias = bias + constant_part(value, state.carry, len(bias))
        state.done += len(groups[i])
        if groups[i]:
            state.range, state.seen = groups[i][-1].range, groups[i][-1].seen
        if i == len(block.layers) - 1:
            merged = _merge(layer, state.carry, value, bias, taps[i])
            if isinstance(merged, str):
                return merged
            return Schedule((*built, merged), forms, reserved)
        pairs = _merge_pairs(block, segments[-1]) if layout[i].interleaved and not any(groups[i + 1 : -1]) else None
        found = _reserve(
            layer, state, value, bias, taps[i], layout[i], needed[state.done], form, pairs, segments[i] is None
        )
        if isinstance(found, str):
            return found
        new, state.carry, used = found
        built.append(new)
        forms |= used
        reserved = max(reserved, len(state.carry.channel))
    raise AssertionError("a block has at least one layer")


def _segment(stages: list[Stage]) -> Stage | str | None:
    """Several stages as one folded one; None for none."""
    if len(stages) <= 1:
        return stages[0] if stages else None
    product: Conv | None = stages[0].folded
    for stage in stages[1:]:
        product = None if product is None else compose(product, stage.folded)
    return (
        Stage(product, stages[0].size, stages[-1].range) if product else "its shortcut's stages do not multiply exactly"
    )


def _taps(block: Block, segments: list[Stage | None]) -> tuple[Taps, ...] | str:
    """Where each layer's part of the shortcut goes in its kernel; the same on maps of every size."""
    layers = tuple(layer.conv.geometry for layer in block.layers)
    parts = tuple(None if segment is None else segment.conv.geometry for segment in segments)
    return chain_taps(layers, parts, spatial(block.fork))


def _value(segment: Stage | None, needed: Tensor, needed_after: Tensor) -> tuple[Entries, Tensor]:
    """The kernel from the carried value to the next one, only where it is needed, and its bias."""
    if segment is None:
        return diagonal(needed.nonzero().flatten()), torch.zeros(len(needed), dtype=torch.float64)
    entries = segment.entries
    used = needed_after[entries.rows]
    if not used.all():
        entries = Entries(entries.rows[used], entries.columns[used], entries.kernel[used])
    return entries, segment.folded.bias


def _merge(layer: Layer, carry: Carry, value: Entries, bias: Tensor, taps: Taps) -> Layer | str:
    conv, channels = layer.conv, layer.conv.out_channels
    group = torch.full((channels,), ANYWHERE)
    if conv.groups > 1:
        group = torch.arange(channels) // (channels // conv.groups)
    entries = spread_entries(value, group, carry)
    if isinstance(entries, str):
        return entries
    extra = Entries(entries.rows, carry.position[entries.columns], entries.kernel)
    merged = assemble(conv.folded(), carry.side, Side(torch.arange(channels), channels), conv.groups, extra, taps)
    if isinstance(merged, str):
        return merged
    norm = to_measure(channels, 1e-5 if conv.norm is None else conv.norm.eps)
    return replace(layer, conv=replace(merged, bias=merged.bias + bias, norm=norm))


def _merge_pairs(block: Block, segment: Stage | None) -> tuple[Tensor, Tensor]:
    """The (channel, group) pairs that the groups of the last layer read."""
    conv = block.layers[-1].conv
    if segment is None:
        rows = columns = torch.arange(conv.out_channels)
    else:
        entries = segment.entries
        rows, columns = entries.rows, entries.columns
    pairs = torch.unique(torch.stack([columns, rows // (conv.out_channels // conv.groups)]), dim=1)
    return pairs[0], pairs[1]


def _reserve(
    layer: Layer, state: _State, value: Entries, bias: Tensor, taps: Taps, wire: Wire, needed: Tensor, form: str,
    merge_pairs: tuple[Tensor, Tensor] | None, identity: bool,
) -> tuple[Layer, Carry, frozenset[str]] | str:  # fmt: skip
    """One layer but the last, with the rows that carry the value on."""
    conv, carry, (low, high) = layer.conv, state.carry, state.range
    rule = None if layer.activation is None else rule_of(layer.activation)
    as_is = torch.zeros_like(needed)
    if identity:
        as_is = passes_as_is(carry, rule, free(rule, low, high)) & needed & ~constant(low, high)
    code = encode(rule, low, high, needed & ~as_is, form, state.seen)
    if isinstance(code, str):
        return code
    carried = as_is.clone()
    carried[code.channel] = True
    wanted = _wanted(conv, wire, carry, value, carried, merge_pairs)
    if isinstance(wanted, str):
        return wanted
    rows = new_rows(carry, code, as_is, wanted, low, high)
    entries = row_entries(rows, carry, value)
    if isinstance(entries, str):
        return entries
    in_tail = conv.groups > 1 and not wire.interleaved
    layout = lay_out(wire, conv.out_channels, rows.group, carry.extra_groups if in_tail else None)
    if isinstance(layout, str):
        return layout
    extra = Entries(layout.reserved[entries.rows], carry.position[entries.columns], entries.kernel)
    after = Side(layout.computed, layout.total)
    groups = conv.groups + (carry.extra_groups if in_tail else 0)
    new = assemble(conv, carry.side, after, groups, extra, taps)
    if isinstance(new, str):
        return new
    new = replace(
        new, norm=spread_norm(conv.norm, layout.computed, layout.total, 1e-5 if conv.norm is None else conv.norm.eps)
    )
    new.bias[layout.reserved] = torch.where(rows.source >= 0, 0.0, rows.scale * bias[rows.channel] + rows.offset)
    kept = torch.where(as_is, carry.constant, code.constant) if identity else code.constant
    next_carry = Carry(
        rows.channel, rows.decode, layout.reserved, rows.group, kept, *after_activation(layer.activation, rule, rows.low, rows.high),
        after, layout.extra_groups,
    )  # fmt: skip
    activation = _with_slopes(layer.activation, rule, after)
    forms = code.forms
    if as_is.any() and carry.side.total == len(carry.channel) == len(
        carry.side.positions
    ):  # x itself, in the first layer
        forms |= {"slope" if rule is not None and rule.slopes else "free"}
    return replace(layer, conv=new, activation=activation), next_carry, forms


def _wanted(
    conv: Conv, wire: Wire, carry: Carry, value: Entries, carried: Tensor, merge_pairs: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | str:
    """Which (channel, group) pairs the map after this layer has to hold."""
    channels = carried.nonzero().flatten()
    if not wire.interleaved:
        return channels, torch.full_like(channels, ANYWHERE)
    if conv.groups == 1:
        if merge_pairs is None or len(carried) < int(merge_pairs[0].max()) + 1:
            return "a shortcut stage between grouped convolutions"
        found = merge_pairs
    else:
        e, r = join(value.columns, carry.channel)
        pairs = torch.unique(torch.stack([value.rows[e], carry.group[r]]), dim=1)
        found = (pairs[0], pairs[1])
    channel, group = found[0][carried[found[0]]], found[1][carried[found[0]]]
    if len(torch.unique(channel)) < len(channels) or bool((group == ANYWHERE).any()):
        return "a grouped convolution would have to read copies that lie in another group"
    return channel, group


def _with_slopes(activation: nn.Module | None, rule: Rule | None, side: Side) -> nn.Module | None:
    """A PReLU with its slopes at the branch's own channels and slope 1, the identity, elsewhere."""
    if rule is None or not rule.slopes:
        return activation
    assert isinstance(activation, nn.PReLU)
    wider = nn.PReLU(side.total, dtype=torch.float64)
    slopes = torch.ones(side.total, dtype=torch.float64)
    slopes[side.positions] = activation.weight.detach().double().expand(len(side.positions))
    wider.weight = nn.Parameter(slopes)
    return wider
