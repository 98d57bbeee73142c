"""A residual is one however its addition is written, and whatever lies in its shortcut that changes no value."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmprune
from rmprune.errors import UnsupportedModel

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
    lambda x, y: torch.stack([x, y, x]).mean([0]),
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


def test_every_way_to_add_is_one() -> None:
    torch.manual_seed(0)
    removal = rmprune.remove_residuals(_Net([*ADDITIONS]).eval(), torch.randn(2, 2, 4, 4))
    assert len(removal.removed) == len(ADDITIONS) + 1 and not removal.kept and removal.max_error < 1e-10


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
