"""From policy to network: budgets met by whole networks from below, and widths reached by cuts while training."""

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rmprune.amc.choose import meet_budget
from rmprune.amc.space import Limits, Space, Widths
from rmprune.errors import InfeasibleBudget
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.gradual import PolicyPruner
from rmprune.pruning.layers import SizedLayer, macs


def chain(*widths: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3))


def space(ratio: float = 0.5, multiple: int = 1) -> Space:
    structure = find_structure(chain(3, 64, 64, 64), torch.zeros(1, 3, 4, 4))
    whole = sum(macs(layer, layer.cin, layer.cout) for layer in structure.layers)
    return Space(structure, macs, ratio * whole, Limits(lowest=0.05, multiple=multiple))


def real_ratio(found: Space, widths: Widths, error: float) -> float:
    """What a measurement might say: an overhead, and everything dearer or cheaper than predicted."""
    return 0.1 + 0.9 * error * found.cost(widths) / found.full_cost


class Clock:
    """Measures policies by a law of its own and remembers how many at once."""

    def __init__(self, law: Callable[[Widths], float]) -> None:
        self.law, self.calls = law, []

    def __call__(self, policies: Sequence[Widths]) -> list[float]:
        self.calls.append(list(policies))
        return [self.law(widths) for widths in policies]


@pytest.mark.parametrize("error", [0.5, 0.9, 1.0, 1.1, 1.8])
def test_the_measured_budget_is_met_within_5_percent_from_below(error: float) -> None:
    found = space(0.5)
    start = found.fit([0.8, 0.5, 0.3])
    clock = Clock(lambda widths: real_ratio(found, widths, error))
    verified = meet_budget(found, start, clock, 0.5)
    ratio = real_ratio(found, verified.widths, error)
    assert verified.ratio == ratio
    assert 0.95 * 0.5 <= ratio <= 0.5
    fractions = found.fractions(verified.widths)
    assert fractions[0] >= fractions[1] >= fractions[2]  # the shape of the policy stays
    assert clock.calls[-1] == [verified.widths]  # measured once more at the end
    assert len(clock.calls) <= 6


def test_a_policy_that_fits_is_kept() -> None:
    found = space(0.5)
    widths = found.uniform()
    clock = Clock(lambda w: 0.49 if w == widths else 0.8)
    assert meet_budget(found, widths, clock, 0.5).widths == widths


def test_one_lucky_measurement_is_not_believed() -> None:
    found = space(0.5)
    widths = found.uniform()
    lucky = [0.49]

    def law(w: Widths) -> float:
        return lucky.pop() if w == widths and lucky else real_ratio(found, w, 1.3)

    verified = meet_budget(found, widths, Clock(law), 0.5)
    assert real_ratio(found, verified.widths, 1.3) <= 0.5


def test_coarse_widths_still_end_below() -> None:
    found = space(0.5, multiple=32)
    verified = meet_budget(found, found.uniform(), Clock(lambda w: real_ratio(found, w, 1.3)), 0.5)
    assert verified.ratio <= 0.5


def test_a_budget_that_no_network_meets_is_refused_with_the_nearest() -> None:
    found = space(0.5)
    with pytest.raises(InfeasibleBudget, match=r"0\.7"):
        meet_budget(found, found.uniform(), Clock(lambda w: 0.7 + 1e-6 * sum(w)), 0.5)


def test_a_network_faster_than_its_budget_ends_whole() -> None:
    found = space(1.0)
    verified = meet_budget(found, found.lowest, Clock(lambda w: 0.3 * found.cost(w) / found.full_cost), 0.5)
    assert verified.widths == found.whole


def test_policy_reached_by_small_cuts_while_training() -> None:
    torch.manual_seed(0)
    model = chain(3, 16, 20, 12).double().train()
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    goal = {"0.0": 5, "1.0": 20, "2.0": 7}
    pruner = PolicyPruner(model, x[:2], goal, prune_epochs=2, every=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    state = SimpleNamespace(model=model, optimizer=optimizer, step=0, total_steps=30, steps_per_epoch=10)
    seen = []
    for _ in range(30):
        state.optimizer.zero_grad()
        nn.functional.cross_entropy(state.model(x), torch.arange(8) % 3).backward()
        state.optimizer.step()
        state.step += 1
        pruner(state)
        seen.append(state.model.get_submodule("0.0").out_channels)
    assert seen[0] == 16
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) > 3  # small cuts
    assert seen[19] == 5  # there after two epochs, and no further
    assert {name: state.model.get_submodule(name).out_channels for name in goal} == goal
    assert model.get_submodule("0.0").out_channels == 16


def test_cost_of_one_layer_depends_on_both_widths() -> None:
    seen: list[tuple[str, int, int]] = []

    def spy(layer: SizedLayer, cin: int, cout: int) -> float:
        seen.append((layer.name, cin, cout))
        return macs(layer, cin, cout)

    structure = find_structure(chain(3, 8, 8), torch.zeros(1, 3, 4, 4))
    Space(structure, spy, 1e9, Limits(multiple=4)).cost((4, 8))
    assert {("0.0", 3, 4), ("1.0", 4, 8), ("4", 8, 3)} <= set(seen)
