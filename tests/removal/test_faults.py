"""The check of every removal: a fault is caught, and told from a network that is itself uncertain."""

import pytest
import torch
from removal_nets import (
    basic,
    conv,
    images,
    prepared,
    small_resnet,
)
from torch import Tensor, nn

from rmprune.errors import NotEquivalent, UnsupportedModel
from rmprune.graph import build
from rmprune.removal import remove_residuals


def test_a_fault_in_the_rewrite_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = build.build_conv

    def faulty(conv_data: object) -> nn.Conv2d:
        module = original(conv_data)  # type: ignore[arg-type]
        module.weight += 1e-7
        return module

    monkeypatch.setattr(build, "build_conv", faulty)
    with pytest.raises(NotEquivalent, match="over the tolerance"):
        remove_residuals(small_resnet(), images())


def test_a_network_that_is_itself_uncertain_is_told_from_a_fault() -> None:
    """A batch norm takes 1e9 off what a bias has put on: float64 itself keeps 7 digits of the rest."""
    model = prepared(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), basic())
    model[0].bias += 1e9
    model[1].running_mean += 1e9
    with pytest.raises(NotEquivalent, match=r"the original itself is no more certain: .* Pass a tolerance"):
        remove_residuals(model, images(), batch_norm=False)
    assert remove_residuals(model, images(), batch_norm=False, tolerance=1e-4).removed == ["3"]


def test_what_torch_fx_does_not_see_is_refused() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = conv(3, 6), basic()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = x
            y.data.add_(1)  # and so does x
            return self.block(torch.relu(y)) + x

    with pytest.raises(UnsupportedModel, match=r"torch\.fx does not see, such as writing into y\.data"):
        remove_residuals(prepared(Alias()), images())
