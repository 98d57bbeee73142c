"""Layer times for the search: the grid, its interpolation, and agreement with the latency model; times are made up."""

import itertools
import json
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.measure.latency_model import LatencyModel
from rmprune.measure.layers import TimedLayer, network_layers
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.time_cost import TimeCost, grid_widths, timed_layers


class Table(LatencyModel):
    """A latency model whose measurements are a formula: bilinear in the widths, so that interpolation is exact."""

    def __init__(self) -> None:
        super().__init__("eager")
        self.asked: set[TimedLayer] = set()
        self.fit = (1.5, 0.25)
        self.overhead = 2.0

    def require(self, layers: Iterable[TimedLayer]) -> None:
        self.asked |= set(layers)

    def layer_ms(self, layer: TimedLayer) -> float:
        kind = json.loads(layer.kind)["type"]
        return 0.1 + layer.cin * layer.cout * 1e-3 + layer.cout * 1e-2 if kind in ("Conv2d", "Linear") else 0.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(40, 10)  # not in the order of execution
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.ReLU6())
        self.last = nn.Sequential(nn.Conv2d(32, 40, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.depthwise(self.stem(x))))


X = torch.zeros(1, 3, 8, 8)


@pytest.fixture
def cost() -> TimeCost:
    model = Net().eval()
    return TimeCost(Table(), model, find_structure(model, X), X)


def test_the_whole_network_costs_what_the_table_predicts(cost: TimeCost) -> None:
    model = Net().eval()
    layers = find_structure(model, X).layers
    found = sum(cost(layer, layer.cin, layer.cout) for layer in layers) + cost.constant
    assert found == pytest.approx(cost.table.predict_layers(network_layers(model, X)))


def test_widths_between_are_interpolated(cost: TimeCost) -> None:
    layers = {layer.name: layer for layer in find_structure(Net().eval(), X).layers}
    for cin, cout in itertools.product((8, 11, 17, 32), (8, 13, 40)):
        expected = 1.5 * (0.1 + cin * cout * 1e-3 + cout * 1e-2) + 0.25
        assert cost(layers["last.0"], cin, cout) == pytest.approx(expected)
    for width in (8, 16, 24, 32):  # depthwise: one width, measured along the diagonal
        assert cost(layers["depthwise.0"], width, width) == pytest.approx(
            1.5 * (0.1 + width**2 * 1e-3 + width * 1e-2) + 0.25
        )
    assert cost(layers["head"], 20, 10) == pytest.approx(1.5 * (0.1 + 0.2 + 0.1) + 0.25)


def test_everything_is_measured_before_the_search(cost: TimeCost) -> None:
    table = cost.table
    assert isinstance(table, Table)
    before = len(table.asked)
    assert before < 80
    layers = find_structure(Net().eval(), X).layers
    for layer in layers:
        cost(layer, max(1, layer.cin // 2), layer.cout)
    assert len(table.asked) == before


def test_grids() -> None:
    assert grid_widths(10, prunable=False) == [10]
    assert grid_widths(6, prunable=True) == [6]
    assert grid_widths(24, prunable=True) == [8, 16, 24]
    wide = grid_widths(960, prunable=True)
    assert wide[0] == 8
    assert wide[-1] == 960
    assert all(width % 32 == 0 for width in wide[1:])
    assert len(wide) <= 7


def test_a_network_that_cannot_be_traced_is_refused_before_anything_is_measured() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.mean() > 0 else x

    model, x = Branching().eval(), torch.ones(1, 3, 8, 8)
    with pytest.raises(UnsupportedModel, match="cannot trace"):
        timed_layers(model, network_layers(model, x))


def test_every_shape_of_a_grouped_network_can_be_built() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 96, 3, groups=24), nn.ReLU(), nn.Flatten(), nn.Linear(96 * 16, 4)
    ).eval()  # fmt: skip
    structure = find_structure(model, X)
    cost = TimeCost(Table(), model, structure, X)
    assert isinstance(cost.table, Table)
    for layer in cost.table.asked:
        block, x = layer.build(1)
        assert block(x).shape[1] == layer.cout
    grouped = next(layer for layer in structure.layers if layer.groups == 24)
    assert cost(grouped, 24, 24) < cost(grouped, 36, 72) < cost(grouped, 48, 96)


@pytest.mark.parametrize(("width", "groups"), [(40, 5), (104, 13), (160, 10), (288, 18), (672, 42)])
def test_narrower_grouped_layers_take_less_whatever_their_groups(width: int, groups: int) -> None:
    """Groups that no multiple of 8 divides, as RegNets have them."""
    model = nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, groups=groups), nn.ReLU())
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(width * 36, 4)).eval()
    structure = find_structure(model, X)
    cost = TimeCost(Table(), model, structure, X)
    grouped = next(layer for layer in structure.layers if layer.groups == groups)
    units = range(groups, width + 1, groups)
    times = [cost(grouped, unit, unit) for unit in units]
    assert times == sorted(set(times)) and times[0] < 0.5 * times[-1]


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Conv1d(3, 8, 1), torch.zeros(1, 3, 4)),
        (nn.Linear(4, 8), torch.zeros(1, 3, 4)),
        (nn.Conv2d(3, 8, 1, groups=1), torch.zeros(1, 3, 4, 4)),
    ],
)
def test_layers_that_cannot_be_timed_one_by_one_are_refused(layer: nn.Module, x: Tensor) -> None:
    after = {2: nn.Linear(8, 2), 3: nn.Conv1d(8, 2, 1), 4: nn.Conv2d(8, 16, 1, groups=8)}[
        2 if isinstance(layer, nn.Linear) else x.dim()
    ]
    last = [nn.Conv2d(16, 2, 1)] if x.dim() == 4 else []
    model = nn.Sequential(layer, nn.ReLU(), after, *last).eval()
    with pytest.raises(UnsupportedModel, match="cannot be timed one by one"):
        TimeCost(Table(), model, find_structure(model, x), x)
