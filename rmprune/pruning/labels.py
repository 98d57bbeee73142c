"""Labels: int64 tensors of the shape of a value that say for each element which channel it belongs to, and which channels go together.

A tensor of labels is expanded (stride 0) along each dimension on which it does not change: maps of any size cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor


class Channels:
    """A union-find over channels, numbered from 1. Channels that go together have the same root; those that stay have root 0."""

    def __init__(self) -> None:
        self.root = torch.zeros(1, dtype=torch.int64)
        self._why = torch.zeros(1, dtype=torch.int64)
        self._texts = [""]

    def copy(self) -> Channels:
        """The same, to try things on."""
        other = Channels()
        other.root, other._why, other._texts = self.root.clone(), self._why.clone(), list(self._texts)
        return other

    def new(self, count: int) -> Tensor:
        """Numbers [count] for the outputs of a layer."""
        numbers = torch.arange(len(self.root), len(self.root) + count)
        self.root = torch.cat([self.root, numbers])
        self._why = torch.cat([self._why, torch.zeros_like(numbers)])
        return numbers

    def stay(self, labels: Tensor, why: str) -> bool:
        """Leave these channels whole; False where all of them were already."""
        roots = self.root[thin(labels)].unique()
        found = torch.isin(self.root, roots[roots > 0])
        self._texts.append(why)
        self._why[found] = len(self._texts) - 1
        self.root[found] = 0
        return bool(found.any())

    def unite(self, first: Tensor, second: Tensor, why: str) -> None:
        """The channels at the same place of two tensors of one shape go together; `why`, where one of them must stay."""
        one, two = self.root[first].flatten(), self.root[second].flatten()
        apart = one != two
        if not bool(apart.any()):
            return
        count = len(self.root)
        pairs = coo_array((np.ones(int(apart.sum())), (one[apart].numpy(), two[apart].numpy())), (count, count))
        _, least, part = np.unique(
            connected_components(pairs, directed=False)[1], return_index=True, return_inverse=True
        )
        to = torch.from_numpy(least[part])
        self.stay((to == 0).nonzero().flatten(), why)
        self.root = to[self.root]

    def why(self, labels: Tensor) -> str | None:
        """The reason for which the first of these channels that must stay does; None where all may go."""
        whole = labels[(labels > 0) & (self.root[labels] == 0)]
        return self._texts[int(self._why[whole[0]])] if len(whole) else None


def thin(x: Tensor) -> Tensor:
    """x without the repetitions of expanded dimensions."""
    for dim in range(x.dim()):
        if x.shape[dim] > 1 and x.stride(dim) == 0:
            x = x.narrow(dim, 0, 1)
    return x


def compact(x: Tensor) -> Tensor:
    """The same values, expanded along each dimension on which they do not change."""
    small = thin(x)
    for dim in range(x.dim()):
        if small.shape[dim] > 1 and bool((small == small.narrow(dim, 0, 1)).all()):
            small = small.narrow(dim, 0, 1)
    return small.expand(x.shape)


def varying(x: Tensor) -> list[int]:
    """The dimensions along which a compact tensor changes."""
    return [dim for dim in range(x.dim()) if x.shape[dim] > 1 and x.stride(dim) != 0]


def nobody(shape: Sequence[int]) -> Tensor:
    """Labels of this shape that say: no channel that could go."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def select(x: Tensor, dim: int, stays: Tensor) -> Tensor:
    """x.indexselect on a compact tensor, which stays one."""
    shape = [int(stays.sum()) if d == dim else size for d, size in enumerate(x.shape)]
    return thin(x).index_select(dim, stays.nonzero().flatten()).expand(shape)
