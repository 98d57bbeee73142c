"""One layer of a branch with the rows that carry the shortcut on: which rows, where they lie, how they pass the activation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rmprune.graph.activations import Rule, rule_of
from rmprune.graph.convolution import Conv, dense
from rmprune.graph.obstacle import Obstacle
from rmprune.graph.ranges import Range, constant
from rmprune.removal.chain import ChainLayer, Gate
from rmprune.removal.copies import (
    ANYWHERE,
    Carry,
    Entries,
    Side,
    after_activation,
    assemble,
    matches,
    new_rows,
    passes_as_is,
    row_entries,
    spread_norm,
)
from rmprune.removal.forms import CodeShift, cheapest_code, free
from rmprune.removal.geometry import Taps


@dataclass
class Sweep:
    """Where the sweep along the branch stands.

    carry: the value v of K channels in the map; range: (low, high) of v, (K,) each; seen: the largest |v| that the examples showed;
    done: how many stages of the shortcut it has behind it.
    """

    carry: Carry
    range: Range
    seen: float
    done: int = 0


def reserve(
    layer: ChainLayer, sweep: Sweep, value: Entries, bias: Tensor, taps: Taps, wire: Wire, needed: Tensor, form: str,
    merge_pairs: tuple[Tensor, Tensor] | None, identity: bool,
) -> tuple[ChainLayer, Carry, frozenset[str]]:  # fmt: skip
    """One layer but the last, with the rows that carry the value on; what the map holds then; the forms used.

    value, bias: what the shortcut does to v here, a kernel (K', K) of entries and (K',); needed: (K',) bool, the channels that are read
    later. merge_pairs: (channel, group) that the groups of the last layer read, (P,) each; identity: v itself is carried on.
    Raises Obstacle where nothing carries it exactly.
    """
    conv, carry, (low, high) = layer.conv, sweep.carry, sweep.range
    rule = None if layer.activation is None else rule_of(layer.activation)
    sliced = form == "slice" and not bool(free(rule, low, high)[needed].all())
    sliced |= layer.gate is not None and _unit(layer.gate) is None
    if sliced and wire.interleaved:
        raise Obstacle("between grouped convolutions activation and gate cannot be applied to a slice")
    if layer.tail and wire.interleaved:
        raise Obstacle("between grouped convolutions nothing can be concatenated")
    if sliced:
        rule = None  # copies pass beside it
    as_is, move = torch.zeros_like(needed), CodeShift(torch.ones_like(carry.low), torch.zeros_like(carry.low))
    if identity:
        # Where one copy would do, several are put together again; a grouped layer keeps them, for they may lie in different groups.
        one_will_do = free(rule, low, high) if conv.groups == 1 else torch.zeros_like(needed)
        # It cannot put a pair together either, but may shift each of the two, where a copy has one place.
        shiftable = conv.groups > 1 and not wire.interleaved and form in ("auto", "shift")
        passing, move = passes_as_is(carry, rule, one_will_do, shiftable)
        as_is = passing & needed & ~constant(low, high)
    code = cheapest_code(rule, low, high, needed & ~as_is, form, sweep.seen)
    carried = as_is.clone()
    carried[code.channel] = True
    wanted = _wanted(conv, wire, carry, value, carried, merge_pairs)
    rows = new_rows(carry, code, as_is, move, wanted, low, high)
    entries = row_entries(rows, carry, value)
    in_tail = conv.groups > 1 and not wire.interleaved
    layout = lay_out(wire, conv.out_channels, rows.group, carry.extra_groups if in_tail else None)
    extra = Entries(layout.reserved[entries.rows], carry.position[entries.columns], entries.kernel)
    after = Side(layout.computed, layout.total)
    groups = conv.groups + (carry.extra_groups if in_tail else 0)
    new = assemble(conv, carry.side, after, groups, extra, taps)
    new = replace(new, norm=spread_norm(conv.norm, layout.computed, layout.total))
    new.bias[layout.reserved] = torch.where(rows.source >= 0, 0.0, rows.scale * bias[rows.channel]) + rows.offset
    kept = torch.where(as_is, carry.constant, code.constant) if identity else code.constant
    moved = rows.source >= 0
    kept = kept.index_add(0, rows.channel[moved], -rows.decode[moved] * rows.offset[moved])
    behind = layer.tail[-1].conv.out_channels if layer.tail else 0  # of the branch, before the copies
    own = torch.arange(conv.out_channels + behind) if behind else layout.computed
    next_carry = Carry(
        rows.channel, rows.decode, layout.reserved + behind, rows.group, kept,
        *after_activation(layer.activation, rule, rows.low, rows.high), Side(own, layout.total + behind), layout.extra_groups,
    )  # fmt: skip
    forms = code.forms
    # It is x itself, in the first layer.
    if as_is.any() and carry.side.total == len(carry.channel) == len(carry.side.positions):
        forms |= {"slope" if rule is not None and rule.slopes else "free"}
    if bool((rows.offset[moved] != 0).any()):
        forms |= {"shift"}
    gate = layer.gate
    if gate is not None and not sliced and len(rows.channel):
        gate, forms = _open_gate(gate, after), forms | {"gate"}
    shown = rows.scale.abs() * sweep.seen
    wider = replace(
        layer, conv=new, activation=_with_slopes(layer.activation, rule, after), split=conv.out_channels if sliced else 0, gate=gate,
        range=layout.spread(layer.range, (rows.low, rows.high)),
        seen=None if layer.seen is None else layout.spread(layer.seen, (rows.offset - shown, rows.offset + shown)),
    )  # fmt: skip
    return wider, next_carry, forms | ({"slice"} if sliced or (behind and len(rows.channel)) else set())


def _wanted(
    conv: Conv, wire: Wire, carry: Carry, value: Entries, carried: Tensor, merge_pairs: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Which (channel, group) pairs, (P,) each, the map after this layer has to hold. carried: (K,) bool."""
    channels = carried.nonzero().flatten()
    if not wire.interleaved:
        return channels, torch.full_like(channels, ANYWHERE)
    if conv.groups == 1:
        if merge_pairs is None or len(carried) < int(merge_pairs[0].max()) + 1:
            raise Obstacle("a shortcut stage between grouped convolutions")
        found = merge_pairs
    else:
        e, r = matches(value.columns, carry.channel)
        pairs = torch.unique(torch.stack([value.rows[e], carry.group[r]]), dim=1)
        found = (pairs[0], pairs[1])
    channel, group = found[0][carried[found[0]]], found[1][carried[found[0]]]
    if len(torch.unique(channel)) < len(channels) or bool((group == ANYWHERE).any()):
        raise Obstacle("a grouped convolution would have to read copies that lie in another group")
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


_ONE = 40.0  # sigmoid(40) is exactly 1.0, from 17 on in float32 and from 37 on in float64; so are the clipped ones


def _unit(gate: Gate) -> float | None:
    """What the last layer of a gate has to emit for a factor of exactly 1; None where nothing does, or its rows are tied in groups."""
    last = gate.layers[-1] if gate.layers else None
    if last is None or last.conv.groups > 1:
        return None
    if last.activation is None:
        return 1.0
    value = torch.full((1, last.conv.out_channels, 1, 1), _ONE, dtype=torch.float64)
    return _ONE if bool((last.activation(value) == 1).all()) else None


def _open_gate(gate: Gate, side: Side) -> Gate:
    """The gate over a larger map: it reads the branch's own channels alone, and is exactly 1 on the others (RM.md 3)."""
    layers = list(gate.layers)
    unit = _unit(gate)
    assert unit is not None
    for i, layer in enumerate(layers):
        conv = dense(layer.conv.folded()) if i == 0 else layer.conv.folded()
        sides = [Side(torch.arange(count), count) for count in (conv.in_channels, conv.out_channels)]
        before, after = side if i == 0 else sides[0], side if i == len(layers) - 1 else sides[1]
        nothing = Entries(torch.arange(0), torch.arange(0), torch.zeros(0, 1, 1, dtype=torch.float64))
        wider = assemble(conv, before, after, conv.groups, nothing, Taps(torch.arange(1), torch.arange(1), False))
        ends = torch.full((3, after.total), unit, dtype=torch.float64)  # bias, and the range of what it emits
        ends[:, after.positions] = torch.stack([conv.bias, *layer.range])
        layers[i] = replace(layer, conv=replace(wider, bias=ends[0]), range=(ends[1], ends[2]), seen=None)
    return replace(gate, layers=tuple(layers))


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
