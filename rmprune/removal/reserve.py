"""One layer of a branch with the rows that carry the shortcut on: which rows, where they lie, how they pass the activation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rmprune.removal.activations import Rule, rule_of
from rmprune.removal.assemble import Entries, Side, assemble, join, spread_norm
from rmprune.removal.blocks import Layer
from rmprune.removal.carry import Carry, after_activation, new_rows, passes_as_is, row_entries
from rmprune.removal.encode import constant, encode, free
from rmprune.removal.geometry import Taps
from rmprune.removal.kernels import Conv
from rmprune.removal.layout import ANYWHERE, Wire, lay_out
from rmprune.removal.ranges import Range


@dataclass
class State:
    """Where the sweep along the branch stands: what is carried, its range, and how many stages of the shortcut it has behind it."""

    carry: Carry
    range: Range
    seen: float
    done: int = 0


def reserve(
    layer: Layer, state: State, value: Entries, bias: Tensor, taps: Taps, wire: Wire, needed: Tensor, form: str,
    merge_pairs: tuple[Tensor, Tensor] | None, identity: bool,
) -> tuple[Layer, Carry, frozenset[str]] | str:  # fmt: skip
    """One layer but the last, with the rows that carry the value on."""
    conv, carry, (low, high) = layer.conv, state.carry, state.range
    rule = None if layer.activation is None else rule_of(layer.activation)
    sliced = form == "slice" and not bool(free(rule, low, high)[needed].all())
    if sliced and wire.interleaved:
        return "between grouped convolutions the activation cannot be applied to a slice"
    if sliced:
        rule = None  # copies pass beside it
    as_is = torch.zeros_like(needed)
    if identity:
        # Where one copy would do, several are put together again; a grouped layer keeps them, for they may lie in different groups.
        one_will_do = free(rule, low, high) if conv.groups == 1 else torch.zeros_like(needed)
        as_is = passes_as_is(carry, rule, one_will_do) & needed & ~constant(low, high)
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
    new = replace(new, norm=spread_norm(conv.norm, layout.computed, layout.total))
    new.bias[layout.reserved] = torch.where(rows.source >= 0, 0.0, rows.scale * bias[rows.channel] + rows.offset)
    kept = torch.where(as_is, carry.constant, code.constant) if identity else code.constant
    next_carry = Carry(
        rows.channel, rows.decode, layout.reserved, rows.group, kept, *after_activation(layer.activation, rule, rows.low, rows.high),
        after, layout.extra_groups,
    )  # fmt: skip
    forms = code.forms
    if as_is.any() and carry.side.total == len(carry.channel) == len(
        carry.side.positions
    ):  # x itself, in the first layer
        forms |= {"slope" if rule is not None and rule.slopes else "free"}
    split = conv.out_channels if sliced else 0
    activation = _with_slopes(layer.activation, rule, after)
    return (
        replace(layer, conv=new, activation=activation, split=split),
        next_carry,
        forms | ({"slice"} if sliced else set()),
    )


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
