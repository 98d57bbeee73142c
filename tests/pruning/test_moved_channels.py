"""Operations that move channels are followed exactly, or leave what they touch whole and say why; float64.

The check: a cut network equals the whole one in which the channels that went are silent (zero behind layers without a batch norm).
"""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from rmprune.errors import UnsupportedModel
from rmprune.pruning import Budget, prune_coupled
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Structure
from rmprune.pruning.surgery import shrink

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """Convolution `a` (8 channels), what `move` does to it, a reader `b` of `wide` channels, and a head."""

    def __init__(
        self, move: Callable[[Tensor], Tensor], wide: int = 8, reader: nn.Module | None = None, rows: bool = False
    ) -> None:
        super().__init__()
        self.over: tuple[int, ...] = (1,) if rows else () if reader else (2, 3)
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), reader or nn.Conv2d(wide, 6, 3)
        self.c = nn.Linear(6, 4)
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(self.move(torch.relu(self.a(x)))))
        return self.c(y.mean(self.over) if self.over else y)


def silent(model: nn.Module, structure: Structure, keep: dict[str, Tensor]) -> nn.Module:
    """The network with the outputs that go set to zero."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for group in structure.groups:
            for member in group.members:
                if member.side == "out":
                    gone = member.index[~keep[group.name]].flatten()
                    layer = result.get_submodule(member.layer)
                    layer.weight[gone] = 0  # type: ignore[index, operator]
                    if layer.bias is not None:
                        layer.bias[gone] = 0  # type: ignore[index, operator]
    return result


def assert_exact(model: nn.Module, cuts: int = 5) -> Structure:
    """Random cuts of everything that may go."""
    model = model.double().eval()
    structure = find_structure(model, X)
    chance = torch.Generator().manual_seed(1)
    for _ in range(cuts):
        keep = {n: torch.rand(units, generator=chance) < 0.5 for n, units in structure.units.items()}
        for mask in keep.values():
            mask[int(torch.randint(len(mask), (1,), generator=chance))] = True
        with torch.no_grad():
            wanted, got = silent(model, structure, keep)(X), shrink(model, keep, structure)[0](X)
        assert float((wanted - got).abs().max()) < 1e-12 * float(wanted.abs().max())
    return structure


FLAT = nn.Linear(8 * 64, 6)
MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int, nn.Module | None, int]] = {  # the last: units that a has then
    "flip": (lambda y: y.flip(1), 8, None, 8),
    "stack and flatten": (lambda y: torch.stack([y, -y], 1).flatten(1, 2), 16, None, 8),
    "there and back": (lambda y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 8, None, 8),
    "channels last, flattened": (lambda y: y.permute(0, 2, 3, 1).flatten(1), 0, FLAT, 8),
    "flattened by view": (lambda y: y.view(y.shape[0], -1), 0, FLAT, 8),
    "both halves": (lambda y: torch.cat([y.chunk(2, 1)[1], y, y.chunk(2, 1)[0]], 1), 16, None, 4),
    "split by what is there": (lambda y: torch.cat(y.split(y.shape[1] // 2, 1)[::-1], 1), 8, None, 4),
    "one half of chunk": (lambda y: y.chunk(2, 1)[0] * 2, 4, None, 4),
    "ChannelShuffle": (nn.ChannelShuffle(2), 8, None, 4),
    "shuffle by hand": (
        lambda y: y.view(y.size(0), 2, y.size(1) // 2, y.size(2), y.size(3)).transpose(1, 2).flatten(1, 2), 8, None, 4
    ),
    "PixelShuffle": (nn.PixelShuffle(2), 2, None, 2),
    "PixelUnshuffle": (nn.PixelUnshuffle(2), 32, None, 8),
    "padded channels": (lambda y: nn.functional.pad(y, (0, 0, 0, 0, 2, 1)), 11, None, 8),
    "repeated": (lambda y: y.repeat(1, 2, 1, 1), 16, None, 8),
    "spatial attention": (lambda y: y * torch.sigmoid(y.flatten(2).mean(-1)[..., None, None]), 8, None, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_channels_is_followed(name: str) -> None:
    move, wide, reader, units = MOVES[name]
    structure = assert_exact(Net(move, wide, copy.deepcopy(reader)))
    assert structure.units == {"a": units, "b": 6} or name == "one half of chunk"


def test_halves_by_slices_with_numbers() -> None:
    """The first half is written for its size, the second takes what is left."""
    structure = assert_exact(Net(lambda y: torch.cat([y[:, :4].abs(), y[:, 4:]], 1)))
    assert structure.units == {"a": 4, "b": 6}
    assert structure.group("a").members[0].index.flatten().tolist() == [4, 5, 6, 7]
    assert "x[:, :4] is written for this number of channels" in structure.frozen["a"]


PERMUTATION = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
STAY: dict[str, tuple[Callable[[Tensor], Tensor], int, nn.Module | None, str]] = {
    "roll": (lambda y: torch.roll(y, 1, 1), 8, None, r"roll\(...\) is written for this number"),
    "view with numbers": (lambda y: y.view(-1, 8 * 64), 0, FLAT, "view"),
    "a pool over channels": (lambda y: F.avg_pool3d(y, (3, 1, 1), 1, (1, 0, 0)), 8, None, "avg_pool3d"),
    "a pool of features": (
        lambda y: F.max_pool1d(y.mean((2, 3)), 3, 1, 1)[..., None, None].repeat(1, 1, 3, 3),
        8,
        None,
        "max_pool1d",
    ),
    "a pool of rows": (
        lambda y: F.lp_pool2d(y.flatten(2), 1.0, 1)[..., None].expand(-1, -1, -1, 3),
        8,
        None,
        "lp_pool2d",
    ),
    "a pool to as many channels": (lambda y: F.adaptive_avg_pool3d(y, (8, 4, 4)), 8, None, "adaptive_avg_pool3d"),
    "reflected channels": (
        lambda y: F.pad(y.flatten(2), (0, 0, 1, 1), "reflect")[..., None].expand(-1, -1, -1, 3),
        10,
        None,
        "pad",
    ),
    "softmax": (lambda y: y.softmax(1), 8, None, "softmax"),
    "a permutation as a tensor": (lambda y: y[:, PERMUTATION], 8, None, "slice"),
    "matmul": (lambda y: (y.flatten(2) @ y.flatten(2).mT).flatten(1), 0, nn.Linear(64, 6), "matmul"),
    "rows of channels": (lambda y: y.flatten(1, 2), 0, nn.Linear(8, 6), "positions"),
    "Flatten(1, 2)": (nn.Flatten(1, 2), 0, nn.Linear(8, 6), "positions"),
}


@pytest.mark.parametrize("name", STAY)
def test_what_needs_channels_in_their_number_leaves_them_whole(name: str) -> None:
    move, wide, reader, why = STAY[name]

    structure = assert_exact(Net(move, wide, copy.deepcopy(reader), rows="positions" in why))
    assert structure.units == {"b": 6}
    assert re.search(why, structure.frozen["a"]), structure.frozen["a"]


class Twice(nn.Module):
    """What tensors cannot be cut: a weight that is computed, one that two layers share; and norms that are frozen or used twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = FrozenBatchNorm2d(8) if kind == "frozen" else nn.BatchNorm2d(8)
        self.c, self.head = nn.Conv2d(8, 8, 3, bias=False), nn.Linear(8, 2)
        self.kind = kind
        if kind == "computed":
            parametrizations.weight_norm(self.b)
        if kind == "shared":
            self.b.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        z = self.norm(self.b(y)) if self.kind == "norm twice" else self.b(y)
        return self.head(torch.relu(self.c(z)).mean((2, 3)))


def test_a_frozen_batch_norm_is_cut_along() -> None:
    assert assert_exact(Twice("frozen")).units == {"a": 8, "b": 8, "c": 8}


def test_a_norm_used_twice_ties_what_it_reads() -> None:
    structure = assert_exact(Twice("norm twice"))
    assert set(structure.group("a").producers) == {"a", "b"} and set(structure.units) == {"a", "c"}


def test_tensors_that_cannot_be_cut() -> None:
    structure = find_structure(Twice("computed").double().eval(), X)
    assert set(structure.units) == {"c"} and "computed from other tensors" in structure.frozen["b"]
    with pytest.raises(UnsupportedModel, match="b: it shares a tensor with c"):
        find_structure(Twice("shared").double().eval(), X)


def test_torch_pruning_is_not_given_what_it_would_cut_wrongly() -> None:
    model = Net(nn.ChannelShuffle(2)).double().eval()
    pruned = prune_coupled(model, X, importance="magnitude", budget=Budget(macs_ratio=0.9))
    assert pruned.a.out_channels == 8 and pruned.b.out_channels < 6  # type: ignore[union-attr, operator]
