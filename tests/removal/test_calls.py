"""Calls that are more than a layer and its one map: arguments of a layer, arithmetic on sizes."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from removal_nets import basic, conv_bn, fold_batch_norms, fuse_linear, images, prepared, worst_error
from torch import Tensor, nn

from rmprune.errors import NotEquivalent
from rmprune.graph import build
from rmprune.removal import remove_residuals


class Told(nn.Module):
    """A stem, a block, and a transposed convolution that is told the size of its output; its own choice is 15x15."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block = nn.Sequential(*conv_bn(3, 6), nn.ReLU()), block
        self.up = nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.block(self.stem(x)), output_size=(16, 16))


@pytest.mark.parametrize(
    ("change", "block"),
    [
        (lambda model: remove_residuals(model, images()).model, basic),
        (lambda model: fold_batch_norms(model, images()), nn.Identity),
        (lambda model: fuse_linear(model, images(), "always"), nn.Identity),
    ],
    ids=["remove_residuals", "fold_batch_norms", "fuse_linear"],
)
def test_arguments_of_a_layer_are_passed_on(
    change: Callable[[nn.Module], nn.Module], block: Callable[[], nn.Module]
) -> None:
    model = prepared(Told(block()))
    expected, found = model(images()), change(model)(images())
    assert found.shape == expected.shape == (2, 3, 16, 16)
    assert (found - expected).abs().max() < 1e-12


class Sum(nn.Module):
    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.add, self.stem, self.branch = add, nn.Sequential(*conv_bn(3, 6), nn.ReLU()), nn.Sequential(*conv_bn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.add(self.branch(y), y).relu()


ADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.add": lambda x, y: torch.add(other=x, input=y),
    "x.add": lambda x, y: x.add(other=y),
    "torch.sub": lambda x, y: torch.sub(x, other=y),
}


@pytest.mark.parametrize("name", ADDED)
def test_operands_by_name_are_added(name: str) -> None:
    model = prepared(Sum(ADDED[name]))
    removal = remove_residuals(model, images())
    assert removal.removed and (removal.model(images()) - model(images())).abs().max() < 1e-12


def test_a_result_of_another_shape_than_what_was_checked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build._Builder, "_module", lambda self: nn.Sequential(nn.Conv2d(3, 4, 3)).double())
    with pytest.raises(NotEquivalent, match=r"\(5, 4, 6, 6\), the original \(5, 8, 8, 8\): a fault"):
        fold_batch_norms(prepared(*conv_bn(3, 8)), images())


def enlarged(height: int) -> int:
    height *= 2
    return height


SIZES: dict[str, Callable[[Tensor], tuple[int, int]]] = {
    "shape": lambda x: (x.shape[2] * 2, x.shape[3] * 2),
    "size": lambda x: (2 * x.size(2), x.size()[-1] * 2),
    "sum": lambda x: ((x.shape[2] + 1) * 2, (x.shape[3] // 2) * 2 * 2),
    "rounded": lambda x: (math.ceil(x.shape[2] / 2) * 2, x.dim() * 2),
    "in place": lambda x: (enlarged(x.shape[2]), enlarged(x.shape[3])),
}


@pytest.mark.parametrize("name", SIZES)
def test_arithmetic_on_sizes_is_no_scaling_of_a_map(name: str) -> None:
    class Enlarged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Sequential(*conv_bn(3, 6), nn.ReLU()), basic()

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(0.5 * self.block(self.stem(x)), size=SIZES[name](x))

    model = prepared(Enlarged())
    removal = remove_residuals(model, images())
    assert removal.removed == ["0.block"] and removal.kept == {}
    assert worst_error(removal, model) < 1e-12 and worst_error(removal, model, size=9) < 1e-12
