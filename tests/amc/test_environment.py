"""The game: actions that are stored as executed, states of the layer that comes next, rewards."""

import itertools

import pytest
from amc_spaces import STRUCTURES, environment

from rmprune.amc.environment import FEATURES, Environment
from rmprune.amc.space import Space
from rmprune.errors import ConfigError


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
