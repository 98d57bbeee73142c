"""Policies and the game: budgets that nothing breaks, actions that are stored as executed, states of the layer that comes next."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rmprune.amc.environment import FEATURES, Environment
from rmprune.amc.space import COSTS, Limits, Space, params
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Layer, Structure, macs

X = torch.randn(2, 3, 8, 8)


def conv(cin: int, cout: int, kernel: int = 1, groups: int = 1, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU6(),
    ]


def v1() -> nn.Sequential:
    """A small MobileNetV1: stem, then depthwise and pointwise; the first depthwise is tied to the stem."""
    return nn.Sequential(
        *conv(3, 16, 3), *conv(16, 16, 3, groups=16), *conv(16, 40), *conv(40, 40, 3, groups=40, stride=2), *conv(40, 36),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(36, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """Two inverted residuals on one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, 16, 3))
        self.a = nn.Sequential(*conv(16, 32), *conv(32, 32, 3, groups=32), nn.Conv2d(32, 16, 1))
        self.b = nn.Sequential(*conv(16, 48), *conv(48, 48, 3, groups=48), nn.Conv2d(48, 16, 1))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        return self.head(x + self.b(x))


def structure(model: nn.Module) -> Structure:
    return find_structure(model, X)


def jagged(layer: Layer, cin: int, cout: int) -> float:
    """A measured-time-like cost: not monotone, widths off the multiples of 8 are dearer."""
    return macs(layer, cin, cout) * (1.0 if cin % 8 == 0 and cout % 8 == 0 else 1.6) + 50


STRUCTURES = {"v1": structure(v1()), "residual": structure(Residual())}


def space(name: str = "v1", ratio: float = 0.5, cost=macs, **limits) -> Space:  # type: ignore[no-untyped-def]
    found = STRUCTURES[name]
    whole = sum(cost(layer, layer.cin, layer.cout) for layer in found.layers)
    return Space(found, cost, ratio * whole, Limits(**limits))


def environment(*args, **kwargs) -> Environment:  # type: ignore[no-untyped-def]
    return Environment(space(*args, **kwargs), lambda widths: 0.5)


def play(env: Environment, actions: list[float]) -> list[float]:
    env.reset()
    executed = []
    for action in actions:
        outcome = env.step(action)
        executed.append(outcome.action)
    assert outcome.done
    return executed


def test_depthwise_layers_are_tied_and_layers_come_in_order() -> None:
    found = space()
    assert [group.name for group in found.groups] == ["0", "6", "12"]
    assert found.whole == (16, 40, 36)


def test_the_last_shared_group_is_there() -> None:
    """The public code drops the last group of a residual network."""
    found = space("residual")
    names = {member.layer for group in found.groups for member in group.members}
    assert {"stem.0", "a.6", "b.6", "head.2"} <= names
    assert [group.name for group in found.groups if len(group.producers) > 1]  # the stream, as one group
    assert len(found.groups) == 3


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("cost", [macs, params, jagged])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_policy_breaks_the_budget_or_the_limits(name: str, cost, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    multiple = data.draw(st.sampled_from([1, 3, 4, 8]))
    highest = data.draw(st.sampled_from([0.5, 0.8, 1.0]))
    try:
        env = environment(
            name, data.draw(st.floats(0.15, 0.9)), cost=cost, multiple=multiple, highest=highest, lowest=0.2
        )
    except InfeasibleBudget:
        return
    actions = data.draw(st.lists(st.floats(0, 1), min_size=3, max_size=3))
    executed = play(env, actions)
    found = env.space
    assert found.cost(env.widths) <= found.budget
    for width, group, fraction in zip(env.widths, found.groups, executed, strict=True):
        assert width >= 1
        assert width >= 0.2 * group.units - 1e-9 or width == found.lowest[found.groups.index(group)]
        assert width % multiple == 0 or width == group.units
        assert fraction == width / group.units
        if any(w <= highest * group.units for w in found.allowed[found.groups.index(group)]):
            assert width <= highest * group.units + 1e-9


def test_cost_is_that_of_the_pruned_structure() -> None:
    found = space("residual", multiple=4)
    widths = (8, 12, 20)
    order = {group.name: torch.randperm(group.units) for group in found.groups}
    shrunk = found.structure.shrunk(found.keep(widths, order))
    for cost in (macs, params):
        expected = sum(cost(layer, layer.cin, layer.cout) for layer in shrunk.layers)
        assert Space(found.structure, cost, 1e12, Limits()).cost(widths) == expected


def test_params_count_weights_and_one_bias_each() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    layers = structure(model).layers
    assert sum(params(x, x.cin, x.cout) for x in layers) == sum(p.numel() for p in model.parameters())
    assert set(COSTS) == {"macs", "params"}


def test_rounding_up_after_the_clip_is_impossible() -> None:
    """A budget right between two widths: the executed one is below although the asked-for fraction rounds up."""
    found = space(multiple=8)
    limit = found.cost((16, 40, 24))
    env = Environment(found.with_budget(limit - 1), lambda widths: 0.0)
    executed = play(env, [1.0, 1.0, 24 / 36])
    assert executed[2] == 16 / 36
    assert env.space.cost(env.widths) <= limit - 1


def test_the_upper_bound_holds_even_where_the_budget_would_allow_more() -> None:
    env = environment(ratio=1.0, highest=0.5)
    assert max(play(env, [1.0] * 3)) <= 0.5
    assert env.widths == (8, 16, 16)


def test_the_executed_action_is_returned_not_the_asked_one() -> None:
    env = environment(ratio=0.4, multiple=8)
    env.reset()
    outcome = env.step(0.97)
    assert outcome.action == env.decided[0] / 16
    assert outcome.state[FEATURES.index("last_action")] == outcome.action


def test_bounds_are_what_can_be_executed() -> None:
    env = environment(ratio=0.35, multiple=1)
    env.reset()
    for _ in range(3):
        low, high = env.bounds()
        decided = list(env.decided)
        assert env.step(1.0).action == pytest.approx(high)
        env.decided = decided
        assert env.step(0.0).action == pytest.approx(low)
    assert env.space.cost(env.widths) <= env.space.budget


def test_the_next_state_is_that_of_the_next_layer() -> None:
    env = environment(ratio=0.9)
    states = [env.reset()]
    for _ in range(3):
        states.append(env.step(1.0).state)
    index = FEATURES.index("index")
    assert [state[index] for state in states[:3]] == [0.0, 0.5, 1.0]
    kernel = FEATURES.index("kernel")
    assert states[0][kernel] > states[1][kernel]  # 3x3 stem, then 1x1


def test_costs_in_the_state_have_one_unit_and_add_up() -> None:
    """Nothing decided: all that depends on a group is left. All decided at whole width: nothing reduced, nothing left."""
    env = environment("residual", ratio=1.0, highest=1.0)
    reduced, left = FEATURES.index("cost_reduced"), FEATURES.index("cost_left")
    state = env.reset()
    assert state[reduced] == 0
    assert state[left] == 1.0  # every layer of this network touches a group, depthwise ones at their place
    lefts = [state[left]]
    for _ in env.space.groups:
        state = env.step(1.0).state
        lefts.append(state[left])
    assert state[reduced] == pytest.approx(0, abs=1e-12)
    assert lefts[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(lefts))
    half = environment("residual", ratio=0.5)
    half.reset()
    for _ in half.space.groups:
        state = half.step(1.0).state
    assert state[reduced] == pytest.approx(1 - half.space.cost(half.widths) / half.space.full_cost)


def test_states_lie_between_0_and_1_and_have_a_name_each() -> None:
    for name in STRUCTURES:
        env = environment(name, ratio=0.4)
        state = env.reset()
        for _ in env.space.groups:
            assert len(state) == len(FEATURES)
            assert all(0 <= value <= 1 for value in state)
            state = env.step(0.6).state


def test_an_impossible_budget_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InfeasibleBudget, match="costs") as caught:
        space(ratio=0.001, lowest=0.5)
    least = float(str(caught.value).split("network costs ")[1].split(";")[0])
    found = Space(STRUCTURES["v1"], macs, least * 1.0001, Limits(lowest=0.5))
    assert found.execute([1.0] * 3) == found.lowest


def test_nothing_to_prune_is_refused() -> None:
    with pytest.raises(ConfigError, match="no channels"):
        Space(Structure((), STRUCTURES["v1"].layers, {}), macs, 1e9, Limits())


def test_a_layer_is_never_pruned_to_nothing() -> None:
    found = space(lowest=0.0, multiple=64, ratio=1.0)  # no multiple of 64 exists: layers stay whole
    assert found.allowed == ((16,), (40,), (36,))
    assert min(space(lowest=0.0, multiple=1).lowest) == 1


def test_fit_uses_the_budget_up_and_keeps_the_shape() -> None:
    found = space(ratio=0.5, multiple=1, lowest=0.05)
    uniform = found.fractions(found.uniform())
    assert max(uniform) - min(uniform) < 0.1
    assert 0.93 * found.budget < found.cost(found.uniform()) <= found.budget
    tilted = found.fractions(found.fit([0.9, 0.5, 0.1]))
    assert tilted[0] > tilted[1] > tilted[2]
    assert found.cost(found.fit([0.9, 0.5, 0.1])) <= found.budget


def test_random_policies_differ_fit_the_budget_and_repeat_by_seed() -> None:
    found = space("residual", ratio=0.4, multiple=2)
    draws = [found.random(generator) for generator in [torch.Generator().manual_seed(0)] for _ in range(20)]
    assert len(set(draws)) > 10
    assert all(found.cost(widths) <= found.budget for widths in draws)
    assert draws[0] == found.random(torch.Generator().manual_seed(0))


def test_rewards() -> None:
    env = environment()
    widths = env.space.uniform()
    assert env.reward(0.9, widths) == 0.9
    logged = Environment(env.space, lambda w: 0.5, reward="error_log_cost")
    assert logged.reward(0.9, widths) > logged.reward(0.8, widths)
    assert logged.reward(0.9, widths) > logged.reward(0.9, env.space.whole)
    with pytest.raises(ConfigError, match="reward"):
        Environment(env.space, lambda w: 0.5, reward="loss")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e-9, 1e-7, -1e-9])
def test_of_a_fraction_of_a_millisecond_too_the_reward_falls_with_error_and_cost(scale: float) -> None:
    known = environment().space
    space = Space(known.structure, lambda layer, cin, cout: scale * cin * cout, float("inf"), known.limits)
    logged = Environment(space, lambda w: 0.5, reward="error_log_cost")
    small, whole = logged.reward(0.9, known.uniform()), logged.reward(0.9, space.whole)
    if scale > 0:
        assert small > logged.reward(0.8, known.uniform()) and small > whole
    else:  # a fitted table can say so; there is nothing to be gained by costs then
        assert small == whole == 0
