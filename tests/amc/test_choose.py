"""A search from end to end on a tiny network: which images it may see, what it reports, and measured time as the budget."""

import dataclasses
from pathlib import Path

import pytest
import torch
from marks import few
from torch import nn

from rmprune import models
from rmprune.amc import choose as module
from rmprune.amc.choose import Goal, Timing, choose, first_images, make_scorer, make_space, network_cost
from rmprune.amc.scoring import importance_order
from rmprune.amc.space import COSTS, params
from rmprune.config import AmcConfig, DataConfig, MeasureConfig, SearchConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.errors import InfeasibleBudget
from rmprune.measure import LatencyModel, count_macs, count_params
from rmprune.pruning.layers import macs
from rmprune.pruning.surgery import shrink
from rmprune.removal import remove_residuals
from rmprune.training.job import Job

CPU = torch.device("cpu")
CONFIG = SearchConfig(episodes=8, warm_up=4, images=60, calibration=40, precision="float32", multiple=4)


def job(config: SearchConfig, data: Dataset) -> Job[AmcConfig]:
    return Job(AmcConfig(search=config), data, CPU, 0)


def conv(cin: int, cout: int, kernel: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, kernel, 1, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout), nn.ReLU6()]


class Inverted(nn.Module):
    """MobileNetV2 in miniature: a stem, two inverted residuals, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(1, 8, 3), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.a = nn.Sequential(*conv(8, 24), *conv(24, 24, 3, 24), nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.b = nn.Sequential(*conv(8, 24), *conv(24, 24, 3, 24), nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Sequential(*conv(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        return self.head(x + self.b(x))


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset(DataConfig())


@pytest.fixture(scope="module")
def networks(data: Dataset) -> tuple[nn.Module, nn.Module]:
    """(with residuals, without): the same function."""
    torch.manual_seed(0)
    original = Inverted().eval()
    return original, remove_residuals(original, data.train.example(64), fuse="always").model


class Forbidden:
    """A split that nobody may read."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"the test split was used ({name})")


def test_budgets_count_against_the_original_network(data: Dataset, networks: tuple[nn.Module, nn.Module]) -> None:
    original, plain = networks
    example = data.train.example(2)
    assert network_cost(original, example, macs) == count_macs(original, example[:1])
    assert network_cost(plain, example, macs) > network_cost(original, example, macs)
    space = make_space(plain, original, example, CONFIG, 0.6)
    assert space.budget == 0.6 * count_macs(original, example[:1])
    convolutions = sum(p.numel() for p in plain.parameters() if p.dim() > 1)
    biases = sum(m.out_channels for m in plain.modules() if isinstance(m, nn.Conv2d)) + 10
    assert network_cost(plain, example, params) == convolutions + biases <= count_params(plain)


@pytest.mark.parametrize("which", few([0, 1], 1))
@pytest.mark.parametrize("constraint", list(COSTS))
def test_a_search_ends_inside_its_budget_and_never_sees_the_test_split(
    data: Dataset, networks: tuple[nn.Module, nn.Module], which: int, constraint: str
) -> None:
    original, network = networks[0], networks[which]
    config = dataclasses.replace(CONFIG, constraint=constraint)
    blind = dataclasses.replace(data, test=Forbidden())  # type: ignore[arg-type]
    example = data.train.example(2)
    space = make_space(network, original, example, config, 0.6)
    chosen = choose(network, space, "agent", job(config, blind), Goal(0.6))
    if constraint == "macs":
        assert count_macs(chosen.model, example[:1]) <= 0.6 * count_macs(original, example[:1])
    else:
        assert network_cost(chosen.model, example, params) <= 0.6 * network_cost(original, example, params)
    assert chosen.facts["verified_ratio"] <= 0.6
    assert len(chosen.facts["episodes"]) == 8
    assert {entry["group"]: entry["kept"] for entry in chosen.facts["widths"]} == chosen.widths
    assert chosen.model(example).shape == (2, 10)


def test_rewards_come_from_the_validation_split_of_the_same_data(
    data: Dataset, networks: tuple[nn.Module, nn.Module]
) -> None:
    space = make_space(networks[1], networks[0], data.train.example(2), CONFIG, 0.6)
    scorer = make_scorer(networks[1], space, job(CONFIG, data))
    images = first_images(data.validation, 60, CPU)[0]
    x, y = next(iter(data.validation.batches(60)))
    assert torch.equal(images, x)
    assert torch.equal(scorer.labels, y)
    built = scorer.build(space.uniform())
    assert scorer.accuracy(space.uniform()) == float((built(x).argmax(1) == y).double().mean())
    assert len(first_images(data.validation, 10**6, CPU)[0]) == len(data.validation)


def test_the_reported_accuracy_is_the_built_networks(data: Dataset, networks: tuple[nn.Module, nn.Module]) -> None:
    space = make_space(networks[1], networks[0], data.train.example(2), CONFIG, 0.6)
    chosen = choose(networks[1], space, "random", job(CONFIG, data), Goal(0.6))
    x, y = next(iter(data.validation.batches(60)))
    assert chosen.facts["validation_accuracy"] == float((chosen.model(x).argmax(1) == y).double().mean())


def test_impossible_budgets_are_refused(data: Dataset, networks: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(InfeasibleBudget):
        make_space(networks[1], networks[0], data.train.example(2), dataclasses.replace(CONFIG, lowest=0.9), 0.1)


class FakeTimes:
    """Stands for the clock: the table sees one law, whole networks obey another (an overhead, and slower by half)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.Place, "ratios", lambda place, networks: self.ratios(place, networks))
        monkeypatch.setattr(LatencyModel, "calibrate", lambda table, networks, x: self.calibrate(table, networks))
        monkeypatch.setattr(LatencyModel, "require", lambda table, layers: None)
        monkeypatch.setattr(LatencyModel, "layer_ms", lambda table, layer: 1e-6 * layer.cin * layer.cout + 1e-5)
        self.measured = 0

    def calibrate(self, table, networks) -> None:  # type: ignore[no-untyped-def]
        assert {"original", "whole"} <= set(networks)
        table.fit = (1.0, 1e-6)

    def time(self, model: nn.Module) -> float:
        return 1e-3 + 1.5e-6 * count_macs(model, torch.zeros(1, 1, 8, 8))

    def ratios(self, place: module.Place, networks: dict[str, nn.Module]) -> dict[str, float]:
        assert place.configuration == ("onnxruntime", "cpu", 1, 1)
        self.measured += 1
        return {name: self.time(model) / self.time(place.original) for name, model in networks.items()}


def test_measured_time_as_the_budget_is_met_from_below(
    data: Dataset, networks: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times, (original, plain) = FakeTimes(monkeypatch), networks
    config = dataclasses.replace(CONFIG, constraint="latency", multiple=1)
    timing = Timing(original, data.train.example(2), MeasureConfig(threads=(1, 2), batch_sizes=(1, 32)), None)
    space = timing.space(plain, config, 0.7, tmp_path / "note")
    chosen = choose(plain, space, "agent", job(config, data), Goal(0.7, timing, tmp_path / "search"))
    assert times.measured > 0
    ratio = times.time(chosen.model) / times.time(original)
    assert 0.95 * 0.7 <= ratio <= 0.7
    assert chosen.facts["verified_ratio"] == pytest.approx(ratio)
    again = timing.space(plain, config, 0.7, tmp_path / "note")
    assert again.budget == space.budget
    monkeypatch.setattr(times, "ratios", lambda place, networks: pytest.fail("measured again"))
    resumed = choose(plain, again, "agent", job(config, data), Goal(0.7, timing, tmp_path / "search"))
    assert resumed.widths == chosen.widths and resumed.facts == chosen.facts


@pytest.mark.long
def test_residual_networks_of_other_kinds_work_as_well(data: Dataset) -> None:
    """An RM'd ResNet (3x3 chain) and a MobileNetV2 of free width with its residuals."""
    example = data.train.example(2)
    torch.manual_seed(0)
    resnet = models.create("resnet8", num_classes=10, in_channels=1, width=4).eval()
    plain = remove_residuals(resnet, data.train.example(32)).model
    wide = models.create("mobilenet_v2_digits", num_classes=10, in_channels=1, width=0.25, free=2).eval()
    for network, original, ratio in ((plain, resnet, 0.8), (wide, wide, 0.7)):
        config = dataclasses.replace(CONFIG, multiple=2, episodes=3, warm_up=2, reconstruct=network is plain)
        space = make_space(network, original, example, config, ratio)
        chosen = choose(network, space, "agent", job(config, data), Goal(ratio))
        assert count_macs(chosen.model, example[:1]) <= ratio * count_macs(original, example[:1])
        x, y = next(iter(data.validation.batches(60)))
        assert chosen.facts["validation_accuracy"] == float((chosen.model(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("form", ["original", "plain"])
def test_a_budget_of_parameters_is_that_of_the_record(
    form: str, data: Dataset, networks: tuple[nn.Module, nn.Module]
) -> None:
    """Batch norms and all: policies just within the budget leave a network whose parameters are within it."""
    original, plain = networks
    network, example = original if form == "original" else plain, data.train.example(2)
    for ratio in (0.5, 0.6, 0.75):
        config = dataclasses.replace(CONFIG, constraint="params", multiple=1)
        space = make_space(network, original, example, config, ratio)
        scores = {group.name: torch.arange(group.units).double() for group in space.groups}
        widths = space.uniform()
        smaller = shrink(network, space.keep(widths, importance_order(scores)), space.structure)[0]
        found = count_params(smaller) / count_params(original)
        assert 0.93 * ratio < found <= ratio
