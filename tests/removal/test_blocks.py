"""Which blocks are found, and the reason for each that stays."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from removal_nets import (
    Residual,
    basic,
    branch,
    conv,
    conv_bn,
    images,
    prepared,
    refused,
    removed,
    stem,
)
from torch import Tensor, nn

from rmprune.removal import remove_residuals


class PreActivation(nn.Module):
    def __init__(self, width: int, after: bool) -> None:
        super().__init__()
        self.norm, self.body = nn.BatchNorm2d(width), branch(conv_bn(width, width), conv(width, width))
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.norm(x))
        return self.body(first) + (first if self.after else x)


@pytest.mark.parametrize(("after", "form"), [(True, "free"), (False, "pair")])
def test_pre_activation(after: bool, form: str) -> None:
    """The shortcut leaves after the activation, where x >= 0, or before it, where nothing bounds x."""
    removal = removed(prepared(conv(3, 6), PreActivation(6, after), PreActivation(6, after)))
    assert [block.form for block in removal.blocks] == [form, form]


def test_branches_that_end_in_an_activation() -> None:
    """DarkNet: x + act(bn(conv(x))) gets a linear 1x1 as merge."""
    layers = nn.Sequential(*conv_bn(6, 3, 1), nn.LeakyReLU(0.1), *conv_bn(3, 6), nn.LeakyReLU(0.1))
    removed(prepared(*conv_bn(3, 6), nn.LeakyReLU(0.1), Residual(layers), Residual(layers)))


def test_nested_blocks() -> None:
    inner = nn.Sequential(*conv_bn(6, 6), nn.ReLU(), basic(), *conv_bn(6, 6))
    removal = removed(prepared(*stem(), Residual(inner, None, nn.ReLU())))
    assert removal.removed == ["3.branch.3", "3"]


def test_a_block_around_one_that_stays_says_so() -> None:
    inner = nn.Sequential(*conv_bn(6, 6), nn.ReLU(), basic(), *conv_bn(6, 6))
    model = prepared(*stem(), Residual(inner, None, nn.ReLU()), basic())
    removal = remove_residuals(model, images(), keep=["3.branch.3"])
    assert removal.removed == ["4"] and removal.kept["3"] == "its branch holds another residual that stays"


REASONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "slice": (lambda y: torch.relu(y)[:, :, 1:, 1:-1], r"a slice, x\[:, :, 1:, 1:-1\]"),
    "method": (lambda y: y.permute(0, 1, 3, 2), r"a call of x\.permute\(\.\.\.\)"),
    "function": (lambda y: torch.flip(y, [2]), r"a call of flip\(\.\.\.\)"),
    "module": (lambda y: F.max_pool2d(y, 3, 1, 1), r"MaxPool2d is no convolution, batch norm, average pool or scaling"),
    "read twice": (lambda y: torch.relu(y) * torch.relu(y).mean(), "multiplied by a value"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_name_code(name: str) -> None:
    """Not the nodes of a graph, which a user has never seen."""
    code, why = REASONS[name]

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = branch(conv_bn(6, 6), conv_bn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, 1:, 1:-1] + code(self.body(x)) if name == "slice" else x + code(self.body(x))

    refused(prepared(*stem(), Odd()), why)


def test_two_nonlinear_ways_are_refused() -> None:
    other = branch(conv_bn(6, 6), conv_bn(6, 6))
    refused(prepared(*stem(), Residual(branch(conv_bn(6, 6), conv_bn(6, 6)), other)), "both ways")


def test_a_norm_alone_is_a_branch_in_either_order() -> None:
    refused(prepared(*stem(), Residual(nn.Sequential(), None)), "adds a value to itself")
    removed(prepared(*stem(), Residual(nn.BatchNorm2d(6), None)))
    removed(prepared(*stem(), Residual(nn.Sequential(), nn.BatchNorm2d(6))))
