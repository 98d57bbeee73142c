"""Constant channels as the intervals of the normalised graph show them: in-place calls, other names, divisors; float64-exact."""

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import conv, images, randomise
from torch import Tensor, nn

from rmprune.pruning.constants import find_constants
from rmprune.pruning.dead import fold_dead_channels
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.reading import read


def constants(model: nn.Module, layer: str) -> list[float]:
    found = find_constants(model, read(model, images(1), values=True))
    return found.inputs[layer].tolist()


def assert_folds(model: nn.Module, widths: dict[str, int]) -> None:
    folded, x = fold_dead_channels(model, images()), images(3, seed=5)
    assert find_structure(folded, images()).units == widths
    with torch.no_grad():
        before, after = model(x), folded(x)
    assert float((after - before).abs().max()) < 1e-13 * float(before.abs().max())


class Pooled(nn.Module):
    """A channel that is 0.7 (with `shift`) or 0 (without), behind an average pool that divides by 3 instead of 4."""

    def __init__(self, shift: float, pool: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.pool, self.b = conv(3, 6, 1), nn.BatchNorm2d(6), pool, conv(6, 5, 1)
        self.head = nn.Linear(5, 4)
        randomise(self.double())
        self.norm.weight.data[2] = 0
        self.norm.bias.data[2] = shift

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(self.pool(torch.relu(self.norm(self.a(x)))))).mean((2, 3)))


@pytest.mark.parametrize("shift", [0.7, -0.7])
def test_a_pool_with_a_divisor_of_its_own(shift: float) -> None:
    model = Pooled(shift, nn.AvgPool2d(2, divisor_override=3)).double().eval()
    assert constants(model, "b")[2] == pytest.approx(max(shift, 0.0) * 4 / 3, rel=1e-15, abs=0)
    assert_folds(model, {"a": 5, "b": 5})


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(2, padding=1, divisor_override=3), nn.AvgPool2d(3, ceil_mode=True, divisor_override=9)]
)
def test_windows_over_the_border_are_no_constant(pool: nn.Module) -> None:
    model = Pooled(0.7, pool).double().eval()
    assert constants(model, "b")[2] != constants(model, "b")[2]  # NaN
    assert_folds(model, {"a": 6, "b": 5})
    assert constants(Pooled(-0.7, pool).double().eval(), "b")[2] == 0


class Renamed(nn.Module):
    """Two names for one map, which the second call of the activation changes for both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.relu = conv(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.b, self.c, self.head = conv(6, 5, 1), conv(6, 5, 1), nn.Linear(5, 4)
        randomise(self)
        self.norm.weight.data[2] = 0
        self.norm.bias.data[2] = -0.7

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(self.a(x))
        b = self.relu(a)
        return self.head((self.b(b) + self.c(a)).mean((2, 3)))


def test_readers_of_another_name_see_the_changed_value() -> None:
    model = Renamed().double().eval()
    assert constants(model, "b")[2] == constants(model, "c")[2] == 0
    assert_folds(model, {"a": 5, "c": 5} if "c" in find_structure(model, images()).units else {"a": 5, "b": 5})


def test_numbers_are_added_and_divided() -> None:
    class Hard(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.a(x))
            return self.head(torch.relu(self.b(y * F.relu6(y + 3) / 6)).mean((2, 3)))

    model = Hard(-1.3, nn.Identity()).double().eval()
    assert constants(model, "b")[2] == pytest.approx(-1.3 * 1.7 / 6, rel=1e-14)
    assert_folds(model, {"a": 5, "b": 5})


def test_bounded_inputs_show_more_than_constants_do() -> None:
    """Behind ReLU6 a sum that never rises above 0 is 0 behind the next ReLU, whatever its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 6, 1), nn.ReLU6(), conv(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 3, 1), nn.Flatten(), nn.Linear(192, 2)
    ).double().eval()  # fmt: skip
    model[3].running_mean[1] = 1e3  # type: ignore[index]
    assert constants(model, "5")[1] == 0
    assert_folds(model, {"0": 6, "2": 3, "5": 3})


def test_a_linear_layer_on_rows_reads_no_channels() -> None:
    model = nn.Sequential(
        conv(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(1, 2), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    model[1].weight.data[0] = 0  # type: ignore[index, union-attr, operator]
    model[1].bias.data[0] = 0  # type: ignore[index, union-attr, operator]
    model = model.double().eval()
    assert all(value != value for value in constants(model, "3"))
    assert find_structure(model, images()).units == {"3": 6}
