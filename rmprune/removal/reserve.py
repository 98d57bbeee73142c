"""One layer of a branch with the rows that carry the shortcut on: which rows, and how they pass the activation."""

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
    Rows,
    Side,
    after_activation,
    assemble,
    matches,
    new_rows,
    passes_as_is,
    row_entries,
    spread_norm,
)
from rmprune.removal.forms import Code, CodeShift, cheapest_code, free
from rmprune.removal.geometry import Taps
from rmprune.removal.layout import Layout, Wire, lay_out


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


@dataclass(frozen=True)
class Segment:
    """What the shortcut does to v beside one layer, all its stages there together.

    value, bias: a kernel (K', K) of entries and (K',); taps: where it goes in the layer's kernel; needed: (K',) bool, the channels that
    are read later; identity: v itself is carried on.
    """

    value: Entries
    bias: Tensor
    taps: Taps
    needed: Tensor
    identity: bool


def reserve(
    layer: ChainLayer, sweep: Sweep, segment: Segment, wire: Wire, form: str, merge_pairs: tuple[Tensor, Tensor] | None
) -> tuple[ChainLayer, Carry, frozenset[str]]:
    """One layer but the last, with the rows that carry the value on; what the map holds then; the forms used.

    merge_pairs: (channel, group) that the groups of the last layer read, (P,) each. Raises Obstacle where nothing carries it exactly.
    """
    conv, carry, (low, high) = layer.conv, sweep.carry, sweep.range
    rule = None if layer.activation is None else rule_of(layer.activation)
    sliced = _passes_beside(layer, rule, sweep, segment, wire, form)
    rule = None if sliced else rule
    as_is, move = _rows_kept(conv, rule, sweep, segment, wire, form)
    code = cheapest_code(rule, low, high, segment.needed & ~as_is, form, sweep.seen)
    carried = as_is.clone()
    carried[code.channel] = True
    wanted = _wanted(conv, wire, carry, segment.value, carried, merge_pairs)
    rows = new_rows(carry, code, as_is, move, wanted, low, high)
    in_tail = conv.groups > 1 and not wire.interleaved
    layout = lay_out(wire, conv.out_channels, rows.group, carry.extra_groups if in_tail else None)
    wider = _widened(layer, rule, sweep, segment, rows, layout, sliced)
    kept = torch.where(as_is, carry.constant, code.constant) if segment.identity else code.constant
    return wider, _next_carry(layer, rule, rows, layout, kept), _forms_used(wider, rule, carry, code, as_is, rows)


def _passes_beside(layer: ChainLayer, rule: Rule | None, sweep: Sweep, segment: Segment, wire: Wire, form: str) -> bool:
    """Whether the copies pass beside activation and gate, which then read a slice. Raises Obstacle where groups hold both."""
    sliced = form == "slice" and not bool(free(rule, *sweep.range)[segment.needed].all())
    sliced |= layer.gate is not None and _unit(layer.gate) is None
    if sliced and wire.interleaved:
        raise Obstacle("between grouped convolutions activation and gate cannot be applied to a slice")
    if layer.tail and wire.interleaved:
        raise Obstacle("between grouped convolutions nothing can be concatenated")
    return sliced


def _rows_kept(
    conv: Conv, rule: Rule | None, sweep: Sweep, segment: Segment, wire: Wire, form: str
) -> tuple[Tensor, CodeShift]:
    """(K',) bool: which channels keep their old rows, and what each of those is moved by."""
    carry, (low, high) = sweep.carry, sweep.range
    if not segment.identity:
        return torch.zeros_like(segment.needed), CodeShift(torch.ones_like(carry.low), torch.zeros_like(carry.low))
    # Where one copy would do, several are put together again; a grouped layer keeps them, for they may lie in different groups.
    one_will_do = free(rule, low, high) if conv.groups == 1 else torch.zeros_like(segment.needed)
    # It cannot put a pair together either, but may shift each of the two, where a copy has one place.
    shiftable = conv.groups > 1 and not wire.interleaved and form in ("auto", "shift")
    passing, move = passes_as_is(carry, rule, one_will_do, shiftable)
    return passing & segment.needed & ~constant(low, high), move


def _widened(
    layer: ChainLayer, rule: Rule | None, sweep: Sweep, segment: Segment, rows: Rows, layout: Layout, sliced: bool
) -> ChainLayer:
    """The layer with these rows, which pass its activation by `rule`, beside its own channels; its gate is open on them."""
    conv, carry, after = layer.conv, sweep.carry, Side(layout.computed, layout.total)
    entries = row_entries(rows, carry, segment.value)
    extra = Entries(layout.reserved[entries.rows], carry.position[entries.columns], entries.kernel)
    groups = conv.groups + layout.extra_groups if conv.groups > 1 else 1
    new = assemble(conv, carry.side, after, groups, extra, segment.taps)
    new = replace(new, norm=spread_norm(conv.norm, layout.computed, layout.total))
    new.bias[layout.reserved] = torch.where(rows.copied, 0.0, rows.scale * segment.bias[rows.channel]) + rows.offset
    gate = layer.gate
    if gate is not None and not sliced and len(rows.channel):
        gate = _open_gate(gate, after)
    shown = rows.scale.abs() * sweep.seen
    return replace(
        layer, conv=new, activation=_with_slopes(layer.activation, rule, after), split=conv.out_channels if sliced else 0,
        gate=gate, range=layout.spread(layer.range, (rows.low, rows.high)),
        seen=None if layer.seen is None else layout.spread(layer.seen, (rows.offset - shown, rows.offset + shown)),
    )  # fmt: skip


def _next_carry(layer: ChainLayer, rule: Rule | None, rows: Rows, layout: Layout, kept: Tensor) -> Carry:
    """What the map after the layer, and after its tail, holds. kept: the constants of v, (K',), but for what copied rows are moved by."""
    moved = rows.copied
    kept = kept.index_add(0, rows.channel[moved], -rows.decode[moved] * rows.offset[moved])
    own, behind = layout.computed, 0
    if layer.tail:  # its channels lie before the copies
        behind = layer.tail[-1].conv.out_channels
        own = torch.arange(layer.conv.out_channels + behind)
    return Carry(
        rows.channel, rows.decode, layout.reserved + behind, rows.group, kept,
        *after_activation(layer.activation, rule, rows.low, rows.high), Side(own, layout.total + behind), layout.extra_groups,
    )  # fmt: skip


def _forms_used(
    layer: ChainLayer, rule: Rule | None, carry: Carry, code: Code, as_is: Tensor, rows: Rows
) -> frozenset[str]:
    """How the rows pass the layer, which has them already. carry, as_is: what was carried before it, and which channels keep their rows."""
    forms = set(code.forms)
    # It is x itself, in the first layer.
    if as_is.any() and carry.side.total == len(carry.channel) == len(carry.side.positions):
        forms.add("slope" if rule is not None and rule.slopes else "free")
    if bool((rows.offset[rows.copied] != 0).any()):
        forms.add("shift")
    if layer.gate is not None and not layer.split and len(rows.channel):
        forms.add("gate")
    if layer.split or (layer.tail and len(rows.channel)):
        forms.add("slice")
    return frozenset(forms)


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
