"""A residual is one however its addition is written, and whatever lies in its shortcut that changes no value."""

import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmprune
from rmprune.errors import UnsupportedModel

_EACH = torch.tensor([0.5, 2.0])[:, None, None]  # of the two channels
Adds = Callable[[Tensor, Tensor], Tensor]
ADDITIONS: list[Adds] = [
    lambda x, y: torch.sub(x, y),
    lambda x, y: torch.sub(x, y, alpha=-1),
    lambda x, y: torch.sub(y, x, alpha=0.5),
    lambda x, y: x.sub(y),
    lambda x, y: y.sub_(x),
    lambda x, y: torch.subtract(x, y),
    lambda x, y: torch.rsub(x, y),
    lambda x, y: torch.rsub(x, y, alpha=0.5),
    lambda x, y: torch.add(x, y, alpha=1),
    lambda x, y: torch.add(x, y, alpha=0.1),
    lambda x, y: y.add_(x, alpha=0.25),
    lambda x, y: operator.iadd(y, x),
    lambda x, y: operator.isub(y, x),
    lambda x, y: sum([x, y]),  # type: ignore[return-value]
    lambda x, y: -(-x - y),
    lambda x, y: torch.stack([x, y]).sum(0),
    lambda x, y: torch.stack((x, y), 1).sum(dim=1, keepdim=False),
    lambda x, y: torch.sum(torch.stack([x, y], dim=-1), -1),
    _THRICE := lambda x, y: torch.stack([x, y, x]).mean([0]),
    lambda x, y: x / 2 + torch.div(y, 3),
    lambda x, y: x + y.div_(_EACH),
    lambda x, y: torch.divide(x, torch.tensor(2.0)) + y.multiply(0.5),
    lambda x, y: x + 1 - y,
    lambda x, y: (2 - y).sub(x, alpha=2) - _EACH,
    lambda x, y: torch.ops.aten.add(x, y),
    lambda x, y: torch.ops.aten.sub.Tensor(x, y, alpha=0.5),
    lambda x, y: x + (torch.ops.aten.mul_(y, 2), y)[1],
    lambda x, y: torch.lerp(x, y, 0.3),
    lambda x, y: y.lerp_(end=x, weight=_EACH),
    lambda x, y: torch.lerp(x, y, torch.tensor(0.3)),
    lambda x, y: torch.addcmul(x, y, _EACH),
    lambda x, y: torch.addcmul(x, torch.sigmoid(F.adaptive_avg_pool2d(y, 1)), y),
    lambda x, y: y.addcmul_(_EACH, x, value=0.5),
    lambda x, y: torch.addcdiv(x, y, _EACH, value=2),
]
IDLE: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.contiguous(),
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: x.view(x.shape),
    lambda x: x.view(*x.shape),
    lambda x: x.reshape(x.size(0), 2, x.size(2), -1),
    lambda x: x.view_as(x),
    lambda x: x.expand_as(x),
    lambda x: torch.clone(x),
    lambda x: x.to(torch.float32),
    lambda x: x.to("cpu"),
    lambda x: x.to(x.dtype),
    lambda x: x.type_as(x),
    lambda x: x.double().float(),
    lambda x: x[:],
    lambda x: x[...],
    lambda x: +x,
    lambda x: F.pad(x, (0, 0, 0, 0)),
    lambda x: F.alpha_dropout(x, 0.1, False),
    lambda x: torch.dropout(x, 0.1, False),
    lambda x: F.max_pool2d(x, 1),
]


class _Net(nn.Module):
    """One residual for each way to add, and the same shortcut in each."""

    def __init__(self, adds: list[Adds], way: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.adds, self.way = adds, way or nn.Identity()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1)) for _ in adds
        )

    def forward(self, x: Tensor) -> Tensor:
        for add, branch in zip(self.adds, self.branches, strict=True):
            x = F.relu(add(self.way(x), branch(x)))
        return x


@pytest.mark.parametrize("first", range(0, len(ADDITIONS), 7))
def test_every_way_to_add_is_one(first: int) -> None:
    torch.manual_seed(0)
    ways = ADDITIONS[first : first + 7]
    removal = rmprune.remove_residuals(_Net(ways).eval(), torch.randn(2, 2, 4, 4))
    thrice = ways.count(_THRICE)
    assert len(removal.removed) == len(ways) + thrice and not removal.kept and removal.max_error < 1e-10


def test_what_changes_no_value_is_no_obstacle() -> None:
    torch.manual_seed(0)
    adds: list[Adds] = [lambda x, y, way=way: way(x) + y for way in IDLE]  # type: ignore[misc]
    removal = rmprune.remove_residuals(_Net(adds).eval(), torch.randn(2, 2, 4, 4))
    assert len(removal.removed) == len(IDLE) and not removal.kept and removal.max_error < 1e-10


def test_a_stride_as_pooling_of_one_pixel() -> None:
    torch.manual_seed(0)
    net = _Net([lambda x, y: x + y], nn.MaxPool2d(1, 2)).eval()
    net.branches[0][2] = nn.Conv2d(2, 2, 1, stride=2)
    assert len(rmprune.remove_residuals(net, torch.randn(2, 2, 5, 4)).removed) == 1


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (lambda x: x.view(x.size(0), 2, 4, 4), "x.view"),  # of these sizes alone
        (lambda x: x.view(x.size(0), 2, x.size(3), x.size(2)), "x.view"),
        (lambda x: x.transpose(2, 3), "x.transpose"),
        (lambda x: x.to(torch.int64).float(), "x.to"),
        (lambda x: x.contiguous().view(x.size(0), -1).view(x.size(0), 2, 4, 4), "x.view"),
    ],
)
def test_what_may_change_one_stays(way: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"a call of {said}"):
        rmprune.remove_residuals(_Net([lambda x, y: x + y], way).eval(), torch.randn(2, 2, 4, 4))


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda x, y: torch.lerp(x, y, torch.sigmoid(y)), "multiplied by a value that is computed on the way"),
        (lambda x, y: torch.addcmul(x, y, y), "multiplied by a value that is computed on the way"),
        (lambda x, y: torch.addcdiv(x, _EACH, y), r"a call of truediv\(...\)"),
        (lambda x, y: x + torch.div(y, 2, rounding_mode="floor"), r"a call of div\(...\)"),
        (lambda x, y: x + (y + torch.ones(4, 4)), "adds weights of other sizes than one number a channel"),
    ],
)
def test_what_is_no_scaled_sum_is_named(add: Adds, said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        rmprune.remove_residuals(_Net([add]).eval(), torch.randn(2, 2, 4, 4))


def test_what_is_left_of_sums_can_be_saved(tmp_path: Path) -> None:
    net = nn.Sequential(_Net([lambda x, y: x]), _Net([lambda x, y: x * 2 + _EACH]), _Net([torch.add])).eval()
    x = torch.randn(2, 2, 4, 4)
    plain = rmprune.remove_residuals(net, x).model
    rmprune.save(plain, tmp_path / "plain")
    assert torch.equal(rmprune.load(tmp_path / "plain")(x), plain(x))
