"""Rows and columns for the copies: who meets whom, and what may not cross groups."""

import pytest
import torch
from conv_data import data, run, x_of
from removal_nets import conv

from rmprune.graph.obstacle import Obstacle
from rmprune.removal.copies import Entries, Side, assemble, entries_of, matches
from rmprune.removal.geometry import Taps


def test_matches_pairs_every_match() -> None:
    for right in ([2, 0, 5], [2, 0, 2, 5]):
        left = [0, 2, 2, 7]
        i, j = matches(torch.tensor(left), torch.tensor(right))
        assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [
            (a, b) for a, x in enumerate(left) for b, y in enumerate(right) if x == y
        ]


def test_assemble_puts_copies_beside() -> None:
    """W1' = [W1; I]: the own rows, and a tap of weight 1 at the centre for each copy."""
    layer = data(conv(3, 4).double(), 3)
    copies = Entries(torch.tensor([4, 5, 6]), torch.arange(3), torch.ones(3, 1, 1, dtype=torch.float64))
    centre = Taps(torch.tensor([1]), torch.tensor([1]), False)
    wide = assemble(layer, Side(torch.arange(3), 3), Side(torch.arange(4), 7), 1, copies, centre)
    out = run(wide, x_of(3))
    assert (out[:, :4] - run(layer, x_of(3))).abs().max() < 1e-13 and torch.equal(out[:, 4:], x_of(3))


def test_assemble_refuses_to_cross_groups() -> None:
    layer = data(conv(4, 4, groups=2).double(), 4)
    crossing = Entries(torch.tensor([4]), torch.tensor([0]), torch.ones(1, 1, 1, dtype=torch.float64))
    side = Side(torch.arange(4), 8)
    with pytest.raises(Obstacle, match="groups"):
        assemble(layer, side, side, 4, crossing, Taps(torch.tensor([1]), torch.tensor([1]), False))


def test_entries_leave_zeros_out() -> None:
    layer = data(conv(3, 2, 1).double().requires_grad_(False), 3)
    layer.weight()[0, 1] = 0
    assert entries_of(layer).rows.tolist() == [0, 0, 1, 1, 1] and entries_of(layer).columns.tolist() == [0, 2, 0, 1, 2]
