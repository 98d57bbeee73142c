"""The check of every removal: a fault is caught, and told from a network that is itself uncertain."""

from collections.abc import Callable
from pathlib import Path

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

from rmprune.artifact import save
from rmprune.errors import NotEquivalent, UnsupportedModel
from rmprune.graph import build
from rmprune.pruning import Budget, prune
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


class Over(nn.Module):
    """`write` puts the second map over the first."""

    def __init__(self, write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.stem, self.block, self.last, self.head, self.write = conv(3, 6), basic(), conv(6, 6), conv(6, 4), write

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        self.write(y, self.last(self.block(torch.relu(y))))
        return self.head(y)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda y, z: y.conj().add_(z), "torch.fx does not see, such as writing into y.conj"),
        (lambda y, z: torch.add(y, z, out=y), r"0\.add_1 writes into out=: give what it returns a name"),
    ],
)
def test_writing_that_torch_fx_does_not_see_is_the_cause_named(
    write: Callable[[Tensor, Tensor], object], said: str, tmp_path: Path
) -> None:
    model = prepared(Over(write))
    for call in (remove_residuals, lambda *given: prune(*given, importance="magnitude", budget=Budget(ratio=0.5))):
        with pytest.raises(UnsupportedModel, match=said):
            call(model, images())
    if "out=" in said:
        with pytest.raises(UnsupportedModel, match=said):
            save(model, tmp_path / "net", example_inputs=images())
