"""What the maps of a rewritten branch carry for the shortcut, and how one layer hands it on. Positions and numbers, no graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rmprune.graph.activations import Rule, image
from rmprune.graph.convolution import Conv, Norm, Pattern, coordinates, to_measure
from rmprune.graph.obstacle import Obstacle
from rmprune.removal.forms import Code, CodeShift, free, shift
from rmprune.removal.geometry import Taps


@dataclass(frozen=True)
class Side:
    """Where a layer's own channels lie in a map of `total` channels. positions: (C,)."""

    positions: Tensor
    total: int


@dataclass(frozen=True)
class Carry:
    """The value v (K channels) in a map: v[k] = sum of decode[r] * map[position[r]] over channel[r] == k, + constant[k].

    constant: (K,), all else (R,), one for each row that carries a part of v. group: the group that row r was put in, or ANYWHERE;
    low, high: its range; side: where the branch's own channels lie; extra_groups: how many were added for copies.
    """

    channel: Tensor
    decode: Tensor
    position: Tensor
    group: Tensor
    constant: Tensor
    low: Tensor
    high: Tensor
    side: Side
    extra_groups: int = 0


@dataclass(frozen=True)
class Rows:
    """New rows of one layer, before its activation, (R,) each.

    Row r is scale[r] * u + offset[r], where u is the old row source[r], or v[channel[r]] where source[r] is -1; decode, group, low,
    high: as in Carry.
    """

    channel: Tensor
    scale: Tensor
    offset: Tensor
    decode: Tensor
    group: Tensor
    source: Tensor
    low: Tensor
    high: Tensor

    @property
    def copied(self) -> Tensor:
        """(R,) bool: which are old rows."""
        return self.source >= 0


def first_copies(low: Tensor, high: Tensor, groups: int) -> Carry:
    """The fork itself, with range low, high (C,): every channel is its own copy, and also the branch's input. groups: the first layer's."""
    channels = len(low)
    index = torch.arange(channels)
    group = index // (channels // groups) if groups > 1 else torch.full_like(index, ANYWHERE)
    one = torch.ones(channels, dtype=torch.float64)
    return Carry(index, one, index, group, torch.zeros_like(one), low, high, Side(index, channels))


def passes_as_is(carry: Carry, rule: Rule | None, direct: Tensor, shiftable: bool) -> tuple[Tensor, CodeShift]:
    """(K,) bool: which channels keep their rows: all of them pass, and (direct, (K,) bool) one copy would not do better.

    With it what each old row (R,) is moved by: where `shiftable`, rows of a channel that has several may be shifted one by one.
    """
    several = torch.bincount(carry.channel, minlength=len(carry.constant)) > 1
    passes = free(rule, carry.low, carry.high)
    move = CodeShift(torch.ones_like(carry.low), torch.zeros_like(carry.low))
    if rule is not None and shiftable:
        found = shift(rule, carry.low, carry.high)
        moved = ~passes & several[carry.channel] & torch.isfinite(found.scale)
        move = CodeShift(torch.where(moved, found.scale, move.scale), torch.where(moved, found.offset, move.offset))
        passes = passes | moved
    failing = torch.zeros_like(several)
    failing[carry.channel[~passes]] = True
    return ~failing & ~(several & direct), move


def new_rows(
    carry: Carry, code: Code, as_is: Tensor, move: CodeShift, wanted: tuple[Tensor, Tensor], low: Tensor, high: Tensor
) -> Rows:  # fmt: skip
    """One set of rows for each wanted (channel, group), (P,) each: copies of old rows for channels `as_is`, else by the code.

    as_is, move: see `passes_as_is`; low, high: (K,), the range of the value.
    """
    channel, group = wanted
    kept_channel, kept_group = channel[as_is[channel]], group[as_is[channel]]
    i, r = matches(kept_channel, carry.channel)
    fits = (carry.group[r] == ANYWHERE) | (kept_group[i] == ANYWHERE) | (carry.group[r] == kept_group[i])
    i, r = i[fits], r[fits]
    by, plus = move.scale[r], move.offset[r]
    kept = Rows(
        carry.channel[r], by, plus, carry.decode[r] / by, kept_group[i], r, by * carry.low[r] + plus, by * carry.high[r] + plus
    )  # fmt: skip
    coded_channel, coded_group = channel[~as_is[channel]], group[~as_is[channel]]
    i, c = matches(coded_channel, code.channel)
    k, scale = code.channel[c], code.scale[c]
    ends = torch.stack([scale * low[k] + code.offset[c], scale * high[k] + code.offset[c]])
    coded = Rows(
        k, scale, code.offset[c], code.decode[c], coded_group[i], torch.full_like(k, -1), ends.amin(0), ends.amax(0)
    )  # fmt: skip
    both = Rows(*[torch.cat([getattr(kept, f), getattr(coded, f)]) for f in Rows.__dataclass_fields__])
    order = torch.argsort(both.channel, stable=True)
    return Rows(*[getattr(both, f)[order] for f in Rows.__dataclass_fields__])


def row_entries(rows: Rows, carry: Carry, value: Entries) -> Entries:
    """The kernel from the old rows to the new: copies, and scale * (value . decode) for the coded ones.

    value: the shortcut's kernel from v to the new value, over channels.
    """
    copied = rows.copied
    index = torch.arange(len(rows.channel))
    coded = index[~copied]
    i, e = matches(rows.channel[coded], value.rows)
    target = coded[i]
    spread = spread_entries(
        Entries(target, value.columns[e], value.kernel[e] * rows.scale[target][:, None, None]), rows.group, carry
    )
    dirac = rows.scale[copied][:, None, None].expand(-1, *value.kernel.shape[1:])
    return Entries(
        torch.cat([index[copied], spread.rows]), torch.cat([rows.source[copied], spread.columns]), torch.cat([dirac, spread.kernel])
    )  # fmt: skip


def spread_entries(value: Entries, group: Tensor, carry: Carry) -> Entries:
    """Entries over channels of v as entries over the carried rows. group: (targets,) where each target lies, or ANYWHERE.

    Raises Obstacle where a target would read a copy in another group.
    """
    e, r = matches(value.columns, carry.channel)
    if bool((carry.group != ANYWHERE).any()) and bool((group != ANYWHERE).any()):
        fits = carry.group[r] == group[value.rows[e]]
        reached = torch.zeros(len(value.columns), dtype=torch.bool)
        reached[e[fits]] = True
        carried = torch.zeros(len(carry.constant), dtype=torch.bool)
        carried[carry.channel] = True
        if bool((carried[value.columns] & ~reached).any()):
            raise Obstacle("a grouped convolution would have to read copies that lie in another group")
        e, r = e[fits], r[fits]
    if len(e) == len(value.rows) and bool((carry.decode == 1).all()) and bool((e == torch.arange(len(e))).all()):
        return Entries(value.rows, r, value.kernel)  # one plain copy of each: nothing to multiply
    return Entries(value.rows[e], r, value.kernel[e] * carry.decode[r][:, None, None])


def constant_part(value: Entries, carry: Carry, targets: int) -> Tensor:
    """What the constants of v add to each target, (targets,): sum over taps and channels of kernel * constant."""
    total = torch.zeros(targets, dtype=torch.float64)
    return total.index_add_(0, value.rows, value.kernel.sum((1, 2)) * carry.constant[value.columns])


def after_activation(
    activation: nn.Module | None, rule: Rule | None, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """The range (R,) of rows behind the activation; a copy with slope 1 keeps its own."""
    if activation is None or rule is None or rule.slopes:
        return low, high
    found = image(activation, low, high)
    assert found is not None
    return found


@dataclass(frozen=True)
class Entries:
    """A sparse kernel: entry e adds kernel[e] at (rows[e], columns[e]). rows, columns: (E,), kernel: (E, kh, kw)."""

    rows: Tensor
    columns: Tensor
    kernel: Tensor


def matches(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Index pairs (i, j) of all matches left[i] == right[j], in the order of `left`. Both hold indices, 0 and up."""
    size = max(int(left.max()) if len(left) else 0, int(right.max()) if len(right) else 0) + 1
    if len(right) == 0 or int(torch.bincount(right, minlength=size).max()) <= 1:
        at = torch.full((size,), -1)
        at[right] = torch.arange(len(right))
        found = at[left]
        index = (found >= 0).nonzero().flatten()
        return index, found[index]
    order = torch.argsort(right, stable=True)
    sorted_right = right[order]
    first_copies = torch.searchsorted(sorted_right, left)
    count = torch.searchsorted(sorted_right, left, right=True) - first_copies
    index = torch.arange(len(left)).repeat_interleave(count)
    first = torch.cumsum(count, 0) - count
    within = torch.arange(len(index)) - first[index]
    return index, order[first_copies[index] + within]


def entries_of(conv: Conv) -> Entries:
    """The non-zero kernels of a folded layer as entries."""
    rows, columns = coordinates(conv)
    weight = conv.weight()
    filled = (weight != 0).flatten(2).any(2)
    return Entries(rows[filled], columns[filled], weight[filled])


def diagonal(channels: Tensor) -> Entries:
    """The identity on some channels (E,)."""
    return Entries(channels, channels, torch.ones(len(channels), 1, 1, dtype=torch.float64))


def assemble(conv: Conv, before: Side, after: Side, groups: int, extra: Entries, taps: Taps) -> Conv:
    """`conv` with its inputs at before.positions and its outputs at after.positions of larger maps, plus the extra entries.

    extra: rows and columns are positions in the maps, its kernels go to `taps`. Bias and norm of the own rows are kept, the
    other rows get bias 0 and no norm. Raises Obstacle where an entry would cross groups.
    """
    if before.total % groups or after.total % groups:
        raise Obstacle("the reserved channels do not fill whole groups")
    width, height = before.total // groups, after.total // groups
    if bool((extra.rows // height != extra.columns // width).any()):
        raise Obstacle("a grouped convolution would have to mix copies of different groups")
    bias = torch.zeros(after.total, dtype=torch.float64)
    bias[after.positions] = conv.bias
    pattern = Pattern(after.positions, before.positions, extra.rows, extra.columns) if groups == 1 else None
    return replace(
        conv, weight=_weight(conv, before, after, groups, extra, taps), bias=bias, in_channels=before.total, groups=groups,
        norm=None, rewritten=True, pattern=pattern,
    )  # fmt: skip


def _weight(conv: Conv, before: Side, after: Side, groups: int, extra: Entries, taps: Taps) -> Callable[[], Tensor]:
    """Builds the kernel (after.total, before.total / groups, kh, kw) of `assemble` when asked to."""
    width = before.total // groups

    def build() -> Tensor:
        own = conv.weight()
        full = torch.zeros(after.total, width, *conv.geometry.kernel, dtype=torch.float64)
        if conv.groups == 1 and _contiguous(after.positions) and _contiguous(before.positions):
            full[: own.shape[0], : own.shape[1]] = own
        else:
            rows, columns = coordinates(conv)
            full[after.positions[rows], before.positions[columns] % width] = own
        r, c = extra.rows[:, None, None], (extra.columns % width)[:, None, None]
        full.index_put_((r, c, taps.rows[None, :, None], taps.columns[None, None, :]), extra.kernel, accumulate=True)
        return full

    return build


def _contiguous(positions: Tensor) -> bool:
    """Whether sorted positions (C,) are 0 to C - 1."""
    return len(positions) > 0 and int(positions[0]) == 0 and int(positions[-1]) == len(positions) - 1


def spread_norm(norm: Norm | None, positions: Tensor, total: int) -> Norm:
    """The norm's rows at `positions` of a larger map; the others, or all where there is no norm, are still to be measured."""
    spread = to_measure(total, norm)
    if norm is None:
        return spread
    rows = {name: getattr(spread, name).clone() for name in ("weight", "bias", "mean", "variance", "measured")}
    for name, values in rows.items():
        values[positions] = getattr(norm, name)
    return replace(spread, **rows)


ANYWHERE = -1
