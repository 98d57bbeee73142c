"""Budgets in peak activation memory are met as the planner counts it, by what lives at the peak alone, or the least is named."""

import dataclasses
import functools

import pytest
import torch
from marks import few, long
from torch import Tensor, nn

import rmprune
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.measure import activation_memory
from rmprune.pruning import find_structure
from rmprune.pruning.peak_memory import ActivationPeaks
from rmprune.pruning.surgery import shrink

X = torch.randn(2, 3, 16, 16)


@functools.cache
def network(plain: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    net = rmprune.models.create("resnet8", num_classes=10, width=8).eval()
    return rmprune.remove_residuals(net, X).model if plain else net


def peak(net: torch.nn.Module) -> int:
    return activation_memory(net, X[:1]).peak_bytes


@pytest.mark.parametrize(
    ("plain", "which", "ratio"), [(True, "free", 0.6), long(False, "free", 0.9), long(True, "uniform", 0.9)]
)
def test_the_budget_is_met_and_hardly_missed(plain: bool, which: str, ratio: float) -> None:
    net = network(plain)
    budget = rmprune.Budget(memory_ratio=ratio, reference_bytes=peak(network()))
    pruned = rmprune.prune(net, X, importance="magnitude", budget=budget, which=which, prove=False)  # type: ignore[arg-type]
    assert 0.8 * ratio < peak(pruned) / peak(network()) <= ratio
    if which == "free":  # the last stage holds a quarter of the first's
        assert rmprune.count_params(pruned) > 0.8 * rmprune.count_params(net)


@pytest.mark.parametrize("which", few(["free", "uniform"], "free"))
@pytest.mark.parametrize(
    ("macs", "memory"), [long(0.5, 0.9), long(0.95, 0.6), (0.6, 0.75)], ids=["macs", "memory", "both"]
)
def test_beside_a_budget_of_macs_both_hold(which: str, macs: float, memory: float) -> None:
    net = network(plain=True)
    budget = rmprune.Budget(macs_ratio=macs, memory_ratio=memory, round_to=1)
    pruned = rmprune.prune(net, X, importance="magnitude", budget=budget, which=which, prove=False)  # type: ignore[arg-type]
    counted = rmprune.count_macs(pruned, X[:1]) / rmprune.count_macs(net, X[:1]) / macs
    held = peak(pruned) / peak(net) / memory
    assert max(counted, held) <= 1 and max(counted, held) > 0.85  # and neither was cut to for nothing


@pytest.mark.parametrize(("dead", "said"), [(1, []), (4, [0.593])])
def test_dead_channels_are_not_said_to_have_taken_what_memory_took(
    dead: int, said: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    for tensor in net[0].parameters():
        tensor.data[:dead] = 0
    budget = rmprune.Budget(macs_ratio=0.9, memory_ratio=0.6, round_to=1)
    cut = rmprune.prune(net, X, importance="magnitude", budget=budget, prove=False)
    assert rmprune.count_macs(cut, X[:1]) < 0.5 * rmprune.count_macs(net, X[:1])
    assert [r.args[1] for r in caplog.records if "went beyond" in r.msg] == pytest.approx(said, abs=1e-3)


def test_what_lives_follows_from_the_widths() -> None:
    net = network(plain=True)
    structure = find_structure(net, X)
    memory = ActivationPeaks(net, structure, X)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        units = {n: int(torch.randint(1, u + 1, (), generator=generator)) for n, u in structure.units.items()}
        keep = {name: torch.arange(structure.units[name]) < count for name, count in units.items()}
        assert memory.peak(units) == peak(shrink(net, keep, structure)[0])


def test_what_saves_more_for_its_importance_goes_first() -> None:
    """At the peak a channel of the first layer holds four times as much as one of the second, and matters hardly more."""
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 2, 1))
    net = nn.Sequential(*layers).eval()
    structure = find_structure(net, X)
    scores = {"0": torch.full((8,), 1.0), "2": torch.full((32,), 0.9)}
    budget = rmprune.Budget(memory_ratio=0.85, reference_bytes=peak(net))
    keep = ActivationPeaks(net, structure, X).allocate(structure, scores, budget)
    assert {name: int(mask.sum()) for name, mask in keep.items()} == {"0": 5, "2": 32}


@pytest.mark.long
def test_the_least_is_named_and_can_be_had() -> None:
    net = network()
    budget = rmprune.Budget(memory_ratio=0.01)
    with pytest.raises(
        InfeasibleBudget, match=r"even one channel a layer holds more.*under these limits is"
    ) as refused:
        rmprune.prune(net, X, importance="magnitude", budget=budget)
    least = float(str(refused.value).split("limits is ")[1].split(" ")[0])
    found = rmprune.prune(net, X, importance="magnitude", budget=dataclasses.replace(budget, memory_ratio=least))
    assert peak(found) <= least * peak(net)
    with pytest.raises(InfeasibleBudget, match="min_channels, min_fraction or round_to forbids it"):
        rmprune.prune(net, X, importance="magnitude", budget=rmprune.Budget(memory_ratio=0.5, min_fraction=0.9))


@pytest.mark.parametrize("beside", [{}, {"macs_ratio": 0.5}])
def test_ways_that_do_not_count_memory_say_so(beside: dict[str, float]) -> None:
    budget = rmprune.Budget(memory_ratio=0.5, **beside)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="memory_ratio is met by one cut of ours"):
        rmprune.pruning.prune_coupled(network(), X, importance="magnitude", budget=budget)
    with pytest.raises(ConfigError, match="memory_ratio is met by one cut of ours"):
        rmprune.pruning.GradualPruner(network(), X, budget, every=1, prune_epochs=1)
    with pytest.raises(ConfigError, match="no time and no memory"):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
        rmprune.Pruner(network(), X, budget, optimizer=optimizer, steps=3)


def test_settings_that_count_costs_of_layers_are_refused() -> None:
    for setting in ({"rank": "score"}, {"lookahead": 3}, {"begin": {"conv1": 4}}):
        with pytest.raises(ConfigError, match="a budget of memory goes by the peak"):
            rmprune.prune(network(), X, importance="magnitude", budget=rmprune.Budget(memory_ratio=0.7), **setting)


class MakesTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + torch.zeros(x.shape[0], 1, 1, 1))


def test_tensors_that_are_made_on_the_way_are_planned() -> None:
    net, x = MakesTensors().eval(), torch.randn(2, 3, 8, 8)
    cut = rmprune.prune(net, x, importance="magnitude", budget=rmprune.Budget(memory_ratio=0.8))
    assert activation_memory(cut, x[:1]).peak_bytes <= 0.8 * activation_memory(net, x[:1]).peak_bytes
