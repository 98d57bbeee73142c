"""Batches that do not fit a network, or are written into it: one clear reason before anything is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmprune
from rmprune.errors import RmpruneError


class _Net(nn.Module):
    def __init__(self, what: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stem, self.branch, self.head = (
            nn.Conv2d(1, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)), nn.Linear(8, 2)
        )  # fmt: skip
        self.other_name = nn.ModuleList([self.stem])
        self.what = what

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        z = self.stem(x).relu()
        return self.what(self, (z + self.branch(z)).relu().mean((2, 3)), y)


def _images(count: int = 4, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, 2, 2)


def _prune(net: nn.Module, x: Any, **more: Any) -> nn.Module:
    return rmprune.prune(net, x, importance="random", budget=rmprune.Budget(ratio=0.8), **more)


def _mixed() -> nn.Module:
    net = _Net(PLAIN).eval()
    net.head.double()
    return net


PLAIN = lambda net, z, y: net.head(z)  # noqa: E731
ADDED = lambda net, z, y: net.head(z + y)  # noqa: E731
LENGTH = lambda net, z, y: net.head(z) * len(z)  # noqa: E731
LOOP = lambda net, z, y: torch.stack([net.head(image) for image in z])  # noqa: E731
ONE = lambda net, z, y: net.head(z.squeeze(0).view(8))  # noqa: E731
WRONG = [(_images(channels=2), torch.arange(4) % 2)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rmprune.remove_residuals(_Net(ADDED), (_images(), torch.randn(2, 8))), "input 2 of 2 holds 2 examples"),
        (lambda: _prune(_Net(ONE), _images(1)), "runs on one example, but not on two"),
        (lambda: rmprune.remove_residuals(_Net(LENGTH), _images()), "size of the batch is written into"),
        (lambda: rmprune.collapse_blocks(_Net(LOOP), _images()), "size of the batch is written into"),
        (lambda: rmprune.remove_residuals(_Net(PLAIN), _images(), input_range=(1, -1)), "is empty"),
        (lambda: _prune(_Net(PLAIN), _images(), data=WRONG), "fails on images of shape"),
        (lambda: _prune(nn.Conv2d(1, 8, 1), _images()), "it is one layer"),
        (lambda: _prune(_mixed(), _images()), r"layer head \(Linear\) fails on inputs of shape \(\d, 8\) float32"),
        (lambda: rmprune.save(_mixed(), "net", example_inputs=_images()), r"layer head \(Linear\) fails"),
        (lambda: rmprune.save(_Net(PLAIN), "net", example_inputs=_images().byte()), "give example_inputs in float32"),
    ],
)  # fmt: skip
def test_the_reason_is_the_true_one(
    call: Callable[[], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RmpruneError, match=said):
        call()


def test_one_example_beside_many_is_each_ones() -> None:
    net, inputs = _Net(ADDED).eval(), (_images(), torch.randn(1, 8))
    plain = rmprune.remove_residuals(net, inputs).model
    assert torch.allclose(plain(*inputs), net(*inputs), atol=1e-5)
    _prune(net, inputs)


def test_ignore_takes_any_name_of_a_module() -> None:
    found = _prune(_Net(PLAIN).eval(), _images(), ignore=["other_name.0"])
    assert "ignore='other_name.0'" in found.rmprune_facts["whole"].values()  # type: ignore[index, union-attr]
