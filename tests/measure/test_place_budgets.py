"""Where time counts: one disturbed measurement refuses nothing, and the narrowest network needs nothing in hand."""

import pytest
import torch
from slim_runs import ON_BOTH_BACKENDS as QUICK

from rmprune.errors import InfeasibleBudget
from rmprune.measure.place import Place, find_ratio


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
