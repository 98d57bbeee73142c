"""Puts a layer's own kernel and the reserved entries into one larger convolution: indices now, the kernel when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rmprune.removal.geometry import Taps
from rmprune.removal.kernels import Block, Conv, Norm, coordinates, to_measure


@dataclass(frozen=True)
class Entries:
    """A sparse kernel: entry e adds kernel[e] (kh, kw) at (rows[e], columns[e])."""

    rows: Tensor
    columns: Tensor
    kernel: Tensor


@dataclass(frozen=True)
class Side:
    """Where a layer's own channels lie in a map of `total` channels."""

    positions: Tensor
    total: int


def join(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
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
    start = torch.searchsorted(sorted_right, left)
    count = torch.searchsorted(sorted_right, left, right=True) - start
    index = torch.arange(len(left)).repeat_interleave(count)
    first = torch.cumsum(count, 0) - count
    within = torch.arange(len(index)) - first[index]
    return index, order[start[index] + within]


def entries_of(conv: Conv) -> Entries:
    """The non-zero kernels of a folded layer as entries."""
    rows, columns = coordinates(conv)
    weight = conv.weight()
    filled = (weight != 0).flatten(2).any(2)
    return Entries(rows[filled], columns[filled], weight[filled])


def diagonal(channels: Tensor) -> Entries:
    """The identity on some channels."""
    return Entries(channels, channels, torch.ones(len(channels), 1, 1, dtype=torch.float64))


def assemble(conv: Conv, before: Side, after: Side, groups: int, extra: Entries, taps: Taps) -> Conv | str:
    """`conv` with its inputs at before.positions and its outputs at after.positions of larger maps, plus the extra entries.

    extra: rows and columns are positions in the maps, its kernels go to `taps`. Bias and norm of the own rows are kept, the
    other rows get bias 0 and no norm. Returns a reason where an entry would cross groups.
    """
    if before.total % groups or after.total % groups:
        return "the reserved channels do not fill whole groups"
    width, height = before.total // groups, after.total // groups
    if bool((extra.rows // height != extra.columns // width).any()):
        return "a grouped convolution would have to mix copies of different groups"
    bias = torch.zeros(after.total, dtype=torch.float64)
    bias[after.positions] = conv.bias
    block = Block(after.positions, before.positions, extra.rows, extra.columns) if groups == 1 else None
    return replace(
        conv, weight=_weight(conv, before, after, groups, extra, taps), bias=bias, in_channels=before.total, groups=groups,
        norm=None, rewritten=True, block=block,
    )  # fmt: skip


def _weight(conv: Conv, before: Side, after: Side, groups: int, extra: Entries, taps: Taps) -> Callable[[], Tensor]:
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
