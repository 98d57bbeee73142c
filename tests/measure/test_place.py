"""The one search for a budget in measured time: what it promises, by made-up times."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from slim_runs import ON_BOTH_BACKENDS as QUICK
from torch import nn

from rmprune.config import MeasureConfig
from rmprune.errors import InfeasibleBudget
from rmprune.measure.place import ATTEMPTS, MARGIN, Found, Place, find_ratio, largest_within


class Clock:
    """Measures sizes by a law of its own, and remembers what was measured together."""

    def __init__(self, law: Callable[[float], float]) -> None:
        self.law, self.turns = law, []  # type: tuple[Callable[[float], float], list[list[float]]]

    def __call__(self, sizes: Sequence[float]) -> list[float]:
        self.turns.append(list(sizes))
        return [self.law(size) for size in sizes]

    def count(self, size: float) -> int:
        return sum(turn.count(size) for turn in self.turns)


def refuse(least: float) -> InfeasibleBudget:
    return InfeasibleBudget(f"takes {least:g}")


def search(
    clock: Clock,
    allowed: float = 0.5,
    at: Callable[[float], float | None] = lambda size: size,
    first: Sequence[float] = (),
) -> Found[float]:
    return largest_within(allowed, at, float, clock, 0.01, 1.0, first=first, refuse=refuse)


@pytest.mark.parametrize("factor", [0.55, 0.9, 1.0, 1.3, 4.0, 20.0])
def test_the_largest_is_near_the_budget_with_something_in_hand_and_measured_twice(factor: float) -> None:
    clock = Clock(lambda size: factor * size)
    found = search(clock)
    assert 0.95 * 0.5 <= found.ratio <= MARGIN * 0.5 and found.ratio == factor * found.candidate
    assert clock.turns[-1] == [found.candidate] and clock.count(found.candidate) == 2
    assert found.networks == len({size for turn in clock.turns for size in turn})


def test_what_meets_the_budget_whole_stays_whole() -> None:
    assert search(Clock(lambda size: 0.3 * size)).candidate == 1.0


def test_one_lucky_measurement_is_not_believed() -> None:
    """Everything looks fast when it is measured for the first time."""
    seen: set[float] = set()

    def law(size: float) -> float:
        lucky = size not in seen and size > 0.4
        seen.add(size)
        return 0.49 if lucky else size

    found = search(Clock(law))
    assert found.candidate <= 0.5 and found.ratio == found.candidate


def test_on_a_staircase_the_widest_step_that_fits_is_taken() -> None:
    def law(size: float) -> float:  # steps of 0.1, and every second one is slower than the next
        step = math.ceil(10 * size - 1e-9)
        return 0.1 * step + (0.12 if step % 2 else 0.0)

    found = search(Clock(law), allowed=0.7)
    assert found.ratio == pytest.approx(0.6) and 0.5 < found.candidate <= 0.6


def test_networks_of_equal_size_may_take_unlike_times() -> None:
    """As policies do that give one width to other layers of one shape; and sizes differ by how they were added up."""
    times = {(0.5, "a"): 0.49, (0.5, "b"): 0.51, (0.7, "a"): 0.7, (math.nextafter(0.7, 1), "b"): 0.72}

    def at(size: float) -> tuple[float, str]:
        return max((own for own in times if own[0] <= size), default=(0.5, "b"))

    for first in itertools.permutations(times, 2):
        for allowed in (0.52, 0.74):
            found = largest_within(
                allowed, at, lambda own: own[0], lambda some: [times[own] for own in some], 0.5, 1.0, first=first, refuse=refuse
            )  # fmt: skip
            assert found.candidate[0] == pytest.approx(allowed - 0.03, abs=0.02)


def test_sizes_with_equal_networks_are_measured_once() -> None:
    clock = Clock(lambda size: size)
    found = search(clock, at=lambda size: max(0.1, math.floor(10 * size) / 10))
    assert found.candidate == 0.4 and clock.count(0.4) == 2  # 0.5 has nothing in hand
    assert all(clock.count(tenth / 10) <= 1 for tenth in range(1, 11) if tenth != 4)


def test_it_begins_with_what_it_is_given() -> None:
    clock = Clock(lambda size: 0.49 if size == 0.123 else 0.8)
    assert search(clock, first=[0.123]).candidate == 0.123 and clock.turns == [[0.123], [0.123]]


def test_sizes_that_cannot_be_had_are_left_out() -> None:
    found = search(Clock(lambda size: size), at=lambda size: None if size < 0.3 else size)
    assert 0.95 * 0.5 <= found.ratio <= 0.5
    with pytest.raises(InfeasibleBudget, match="takes 1"):
        search(Clock(lambda size: size), at=lambda size: None)


def test_the_smallest_needs_nothing_in_hand_and_is_not_refused_for_one_disturbed_measurement() -> None:
    times = iter([0.9, 0.7, 0.495, 0.8, 0.8])
    found = search(Clock(lambda size: next(times)), at=lambda size: 0.01)
    assert (found.candidate, found.ratio) == (0.01, 0.495)
    clock = Clock(lambda size: 0.7 + size)
    with pytest.raises(InfeasibleBudget, match=r"takes 0\.71"):
        search(clock)
    assert clock.count(0.01) == 1 + ATTEMPTS


def test_the_cut_of_slim_is_found_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of one layer, which take as long as they are wide; a cut may say that it cannot be made."""
    turns: list[int] = []

    def ratios(place: Place, networks: dict[str, nn.Module]) -> dict[str, float]:
        turns.append(len(networks))
        return {name: network.out_features / 100 for name, network in networks.items()}  # type: ignore[misc]

    def cut(ratio: float) -> nn.Module:
        if ratio < 0.2:
            raise InfeasibleBudget("not so far")
        return nn.Linear(1, 8 * math.ceil(12.5 * ratio))

    monkeypatch.setattr(Place, "ratios", ratios)
    place = Place.first(MeasureConfig(), nn.Linear(1, 1), torch.zeros(1, 1))
    assert cut(find_ratio(cut, 0.01, 0.999, 0.5, place)).out_features == 48
    assert turns[-1] == 1  # the winner by itself, at the end
    with pytest.raises(InfeasibleBudget, match=r"latency_ratio=0\.2 cannot be met .* takes 0\.2[0-9]"):
        find_ratio(cut, 0.01, 0.999, 0.2, place)


def test_one_disturbed_measurement_refuses_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.4, 0.3])
    monkeypatch.setattr(Place, "ratios", lambda place, networks: {name: next(times) for name in networks})
    network = torch.nn.Linear(1, 1)
    place = Place.first(QUICK.measure, network, torch.zeros(1, 1))
    assert place.least_ratio(network, 0.5) == 0.3

    times = iter([1.4, 1.2, 1.3, 0.3])
    assert place.least_ratio(network, 0.5) == 1.2  # three, then it is believed


def test_the_narrowest_network_needs_nothing_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts aim a little below the budget; where the narrowest one is just within it, that is enough."""
    monkeypatch.setattr(Place, "ratios", lambda place, networks: dict.fromkeys(networks, 0.495))
    place = Place.first(QUICK.measure, torch.nn.Linear(1, 1), torch.zeros(1, 1))
    cut = lambda ratio: torch.nn.Linear(1, round(1000 * ratio))  # noqa: E731
    assert find_ratio(cut, 0.1, 0.999, 0.5, place) == pytest.approx(0.1)
    with pytest.raises(InfeasibleBudget, match=r"takes 0\.49"):
        find_ratio(cut, 0.1, 0.999, 0.49, place)


@pytest.mark.parametrize("allowed", [0.3, 0.5, 0.9])
def test_the_search_ends_a_little_below_the_budget(allowed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is the square of the ratio: the network found takes no more than the budget, and less by a tenth at most."""

    def cut(ratio: float) -> torch.nn.Module:
        network = torch.nn.Linear(1, round(1000 * ratio))
        network.time = ratio**2
        return network

    monkeypatch.setattr(Place, "ratios", lambda place, networks: {name: net.time for name, net in networks.items()})
    place = Place.first(QUICK.measure, torch.nn.Linear(1, 1), torch.zeros(1, 1))
    assert 0.9 * allowed < find_ratio(cut, 0.1, 0.999, allowed, place) ** 2 <= allowed


@pytest.mark.parametrize("near, rounds", [(0.5, 1), (0.9, 2), (0.2, 2), (2.0, 2)])
def test_a_guess_shortens_the_search_and_never_ends_it_elsewhere(
    near: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks as wide as their ratio says, which take as long; one that stands as guessed is measured again and is enough."""
    turns: list[int] = []

    def ratios(place: Place, networks: dict[str, torch.nn.Module]) -> dict[str, float]:
        turns.append(len(networks))
        return {name: network.out_features / 1000 for name, network in networks.items()}  # type: ignore[misc]

    monkeypatch.setattr(Place, "ratios", ratios)
    place = Place.first(QUICK.measure, torch.nn.Linear(1, 1), torch.zeros(1, 1))
    cut = lambda ratio: torch.nn.Linear(1, round(1000 * ratio))  # noqa: E731
    guesses = [near * share for share in (0.98, 0.9)]
    assert 0.48 <= find_ratio(cut, 0.01, 0.999, 0.5, place, guesses) <= 0.4925
    assert len(turns) == 1 + rounds and turns[-1] == 1
