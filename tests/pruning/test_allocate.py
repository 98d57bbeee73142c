"""Allocation: budgets met hard under rounding and limits, ties, infeasible budgets, incremental costs."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marks import draws
from pruning_nets import chain, images, residual
from torch import nn

from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.pruning.allocate import Meter, allocate, allocate_uniform, even_fraction, keep_best, least_cost
from rmprune.pruning.budget import Budget, Target, resolve
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Structure, inner_only, total_cost
from rmprune.pruning.layers import SizedLayer, channels, macs


def plain_structure(widths: tuple[int, ...], kernel: int = 3) -> Structure:
    return find_structure(chain(widths, kernel), images(1))


def random_scores(structure: Structure, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.units, generator=generator) for g in structure.groups}


@settings(max_examples=draws(40, 12), deadline=None)
@given(
    widths=st.lists(st.integers(3, 24), min_size=2, max_size=4),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["ratio", "macs_ratio"]),
    value=st.floats(0.02, 0.98),
    min_channels=st.integers(1, 6),
    min_fraction=st.floats(0, 0.6),
    max_fraction=st.floats(0.6, 1),
    round_to=st.sampled_from([1, 2, 3, 4, 8]),
    rank=st.sampled_from(["per_cost", "importance"]),
)
def test_budget_and_limits_are_hard(
    widths: list[int],
    seed: int,
    kind: str,
    value: float,
    min_channels: int,
    min_fraction: float,
    max_fraction: float,
    round_to: int,
    rank: str,
) -> None:
    structure = plain_structure(tuple(widths))
    budget = Budget(
        **{kind: value},
        min_channels=min_channels,
        min_fraction=min_fraction,
        max_fraction=max_fraction,
        round_to=round_to,
    )
    cost, whole = (channels, sum(widths)) if kind == "ratio" else (macs, total_cost(structure))
    limit = (1 - value) * whole if kind == "ratio" else value * whole
    try:
        keep = allocate(structure, random_scores(structure, seed), budget, rank=rank)
    except InfeasibleBudget:
        assert least_cost(structure, budget, cost) > limit
        return
    after = structure.shrunk(keep)
    assert total_cost(after, cost) <= limit + 1e-6
    for group in structure.groups:
        kept = int(keep[group.name].sum())
        multiples = [
            u
            for u in range(round_to, group.units + 1, round_to)
            if u >= min(min_channels, group.units) and u >= math.ceil(min_fraction * group.units - 1e-9)
        ]
        assert kept >= min(min_channels, group.units)
        assert kept >= min_fraction * group.units - 1e-6
        assert kept % round_to == 0 or kept == group.units
        if multiples and multiples[0] <= max_fraction * group.units:
            assert kept % round_to == 0
            assert kept <= max(max_fraction * group.units, min_channels) + 1e-6


def test_nothing_could_be_given_back() -> None:
    """The result is maximal: one block more anywhere breaks the budget."""
    structure = plain_structure((24, 40, 56))
    budget = Budget(macs_ratio=0.37, round_to=8)
    keep = allocate(structure, random_scores(structure, 0), budget)
    limit = 0.37 * total_cost(structure)
    for name, units in structure.units.items():
        kept = int(keep[name].sum())
        if kept + 8 <= units:
            more = {**keep, name: torch.arange(units) < kept + 8}
            assert total_cost(structure.shrunk(more)) > limit


def test_least_important_go_and_true_means_stay() -> None:
    structure = plain_structure((6, 6))
    scores = {"0": torch.tensor([5.0, 0.1, 4, 0.2, 3, 2]), "3": torch.tensor([9.0, 8, 7, 6, 0.3, 5])}
    keep = allocate(structure, scores, Budget(ratio=0.25))
    assert keep["0"].tolist() == [True, False, True, False, True, True]
    assert keep["3"].tolist() == [True, True, True, True, False, True]


def test_ratio_is_one_global_threshold() -> None:
    structure = plain_structure((16, 16, 16))
    scores = random_scores(structure, 3)
    keep = allocate(structure, scores, Budget(ratio=0.5), rank="importance")
    values, masks = torch.cat(list(scores.values())), torch.cat([keep[n] for n in scores])
    assert int(masks.sum()) == 24
    assert values[masks].min() > values[~masks].max()


def test_ranking_per_cost_differs_from_importance_alone() -> None:
    """A channel of layer 3 is worth twice as much and saves four times as much: it goes first, unless worth decides."""
    structure = plain_structure((16, 8, 16))
    scores = {"0": torch.linspace(1, 1.1, 16), "3": torch.linspace(2, 2.1, 8), "6": torch.full((16,), 99.0)}
    per_cost = allocate(structure, scores, Budget(macs_ratio=0.9))
    alone = allocate(structure, scores, Budget(macs_ratio=0.9), rank="importance")
    assert bool(per_cost["0"].all()) and not bool(per_cost["3"].all())
    assert bool(alone["3"].all()) and not bool(alone["0"].all())


def test_ties_are_broken_the_same_way_every_time() -> None:
    structure = plain_structure((8, 8, 8))
    flat = {name: torch.zeros(units) for name, units in structure.units.items()}
    first = allocate(structure, flat, Budget(macs_ratio=0.5, min_fraction=0.25))
    for _ in range(3):
        again = allocate(structure, dict(reversed(flat.items())), Budget(macs_ratio=0.5, min_fraction=0.25))
        assert all(torch.equal(first[n], again[n]) for n in first)
    kept = first["0"].tolist()
    assert kept == sorted(kept, reverse=True)  # of equal channels the first stay
    assert min(int(m.sum()) for m in first.values()) >= 2


def test_every_score_is_looked_at_in_double() -> None:
    structure = plain_structure((4, 4))
    scores = {"0": torch.tensor([1.0, 1 + 2**-40, 1, 1], dtype=torch.float64), "3": torch.full((4,), 9.0)}
    assert allocate(structure, scores, Budget(ratio=0.375))["0"].tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"min_fraction": 0.5}, "min_fraction=0.5"),
        ({"min_channels": 5}, "min_channels=5"),
        ({"round_to": 8}, "round_to=8"),
    ],
)
def test_infeasible_budget_names_the_limit_and_the_nearest(limits: dict, named: str) -> None:
    structure = plain_structure((16, 16, 16))
    with pytest.raises(InfeasibleBudget, match=named) as error:
        allocate(structure, random_scores(structure, 0), Budget(macs_ratio=0.08, **limits))
    nearest = float(str(error.value).rsplit(" ", 1)[1])
    keep = allocate(structure, random_scores(structure, 0), Budget(macs_ratio=nearest, **limits))
    assert total_cost(structure.shrunk(keep)) <= nearest * total_cost(structure)


@given(st.integers(1, 10**9), st.integers(1, 10**9))
@example(29, 100)  # 0.29 * 100 is less than 29
def test_what_is_said_to_be_the_nearest_is_within(least: int, more: int) -> None:
    target = Target(macs, 0.0, least + more)
    nearest = target.nearest(Budget(macs_ratio=0.5), least)
    assert least <= nearest * target.whole <= 1.0011 * least + 1e-6
    removed = target.nearest(Budget(ratio=0.5), least)
    assert least <= (1 - removed) * target.whole + 1e-6 * least and removed >= 0.999 * more / target.whole


def test_the_nearest_ratio_counts_what_goes() -> None:
    structure = plain_structure((8, 12, 16))
    with pytest.raises(InfeasibleBudget, match=r"min_fraction=0\.75 forbids it.* under these limits is 0\.25$"):
        allocate(structure, random_scores(structure, 0), Budget(ratio=0.5, min_fraction=0.75))


def test_of_equal_scores_the_first_stay() -> None:
    scores = torch.ones(100).index_fill(0, torch.tensor([50, 99]), 2.0)
    assert keep_best(scores, 42).nonzero().flatten().tolist() == [*range(40), 50, 99]


def test_an_even_cut_takes_channels_as_they_are_and_macs_by_the_root() -> None:
    structure = plain_structure((16, 16))
    assert even_fraction(structure, Budget(ratio=0.6)) == pytest.approx(0.4)
    assert even_fraction(structure, Budget(macs_ratio=0.49)) == pytest.approx(0.7)
    assert even_fraction(structure, Budget(macs_ratio=0.5, reference_macs=4 * total_cost(structure))) == 1


def test_infeasible_without_any_limit() -> None:
    structure = plain_structure((4, 4))
    with pytest.raises(InfeasibleBudget, match="even one channel a layer"):
        allocate(structure, random_scores(structure, 0), Budget(ratio=0.9))


def test_reference_is_the_original_network() -> None:
    structure = plain_structure((16, 16))
    whole = total_cost(structure)
    budget = Budget(macs_ratio=0.9, reference_macs=whole / 3)
    assert total_cost(structure.shrunk(allocate(structure, random_scores(structure, 0), budget))) <= 0.3 * whole


def test_latency_needs_a_cost_and_uses_it() -> None:
    """On a staircase of measured times look-ahead crosses the plateaus, on which a single step saves nothing."""
    structure = plain_structure((24, 24))

    def staircase(layer: SizedLayer, cin: int, cout: int) -> float:
        return math.ceil(cin / 8) * math.ceil(cout / 8) * 0.25

    scores = random_scores(structure, 0)
    with pytest.raises(ConfigError, match="cost in milliseconds"):
        allocate(structure, scores, Budget(latency_ratio=0.5))
    keep = allocate(structure, scores, Budget(latency_ratio=0.5), staircase, lookahead=8)
    assert total_cost(structure.shrunk(keep), staircase) <= 0.5 * total_cost(structure, staircase)
    assert {int(m.sum()) % 8 for m in keep.values()} == {0}  # a plateau is used to its end


@pytest.mark.parametrize("build", [chain, residual])
def test_meter_agrees_with_the_whole_network(build: object) -> None:
    structure = find_structure(build(), images(1))  # type: ignore[operator]
    meter = Meter(structure, macs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        group = structure.groups[int(torch.randint(len(structure.groups), (), generator=generator))]
        units = int(torch.randint(1, group.units + 1, (), generator=generator))
        expected = meter.total + meter.change(group.name, units)
        meter.place(group.name, units)
        assert meter.total == expected
    keep = {n: torch.arange(u) < meter.units[n] for n, u in structure.units.items()}
    assert meter.total == total_cost(structure.shrunk(keep))


def test_uniform_and_inner() -> None:
    structure = find_structure(residual(), images(1))
    scores = random_scores(structure, 0)
    budget = Budget(macs_ratio=0.5)
    keep = allocate_uniform(structure, scores, budget, target=resolve(structure, budget))
    assert total_cost(structure.shrunk(keep)) <= 0.5 * total_cost(structure)
    fractions = [float(m.double().mean()) for m in keep.values()]
    assert max(fractions) - min(fractions) < 1 / 8
    assert set(inner_only(structure).units) == {"1.conv1", "2.conv1", "3.conv1"}


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("which", ["free", "uniform"])
@pytest.mark.parametrize("kind", ["ratio", "macs_ratio"])
def test_small_budgets_are_met_and_not_far_from_below(kind: str, which: str, round_to: int) -> None:
    """Rounded to multiples of 8 a uniform cut goes to the nearest multiple: some groups stay whole."""
    structure = plain_structure((16, 32, 64, 64))
    cost = channels if kind == "ratio" else macs
    whole, scores = total_cost(structure, cost), random_scores(structure, 0)
    for value in (0.02, 0.3, 0.7):
        budget = Budget(**{kind: value if kind == "ratio" else 1 - value}, round_to=round_to)
        target = resolve(structure, budget)
        allocator = allocate_uniform if which == "uniform" else allocate
        left = total_cost(structure.shrunk(allocator(structure, scores, budget, target=target)), cost) / whole
        assert left <= 1 - value + 1e-9
        assert left >= 1 - value - (0.05 if round_to == 1 else 0.2)


def test_thousands_of_channels_take_moments() -> None:
    import time

    layers: list[nn.Module] = []
    cin = 3
    for width in [64] * 40:
        layers += [nn.Conv2d(cin, width, 1), nn.ReLU()]
        cin = width
    structure = find_structure(nn.Sequential(*layers, nn.Conv2d(cin, 2, 1)), torch.zeros(1, 3, 4, 4))
    start = time.process_time()
    allocate(structure, random_scores(structure, 0), Budget(macs_ratio=0.1))
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize("limit", [0.5, 0.6, 0.9])
def test_no_hump_of_measured_times_hides_a_budget_that_can_be_met(lookahead: int, limit: float) -> None:
    """Widths between the narrowest and the whole take longer than the whole: by themselves, and in pairs of neighbours."""
    structure = find_structure(chain((16, 16, 16)), images())

    def cost(layer: SizedLayer, cin: int, cout: int) -> float:
        widths = (cin,) if layer.kind == "linear" else (cin, cout)
        return 1.0 + 2 * (cin != cout) + sum((w > 4) + 3 * (4 < w < 16) for w in widths)

    budget = Budget(latency_ratio=limit, reference_ms=total_cost(structure, cost), round_to=2, min_channels=4)
    assert least_cost(structure, budget, cost) / total_cost(structure, cost) == pytest.approx(8 / 14)
    scores = {name: torch.arange(1.0, units + 1) for name, units in structure.units.items()}
    if least_cost(structure, budget, cost) > limit * total_cost(structure, cost):
        with pytest.raises(InfeasibleBudget):
            allocate(structure, scores, budget, cost, lookahead=lookahead)
        return
    keep = allocate(structure, scores, budget, cost, lookahead=lookahead)
    assert total_cost(structure.shrunk(keep), cost) <= limit * total_cost(structure, cost)
