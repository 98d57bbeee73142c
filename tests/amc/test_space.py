"""Policies: budgets and limits that nothing breaks, and what cannot be had."""

import pytest
import torch
from amc_spaces import STRUCTURES, environment, jagged, play, space, structure
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import draws
from torch import nn

from rmprune.amc.environment import Environment
from rmprune.amc.space import COSTS, Limits, Space, params
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.pruning.groups import Structure
from rmprune.pruning.layers import macs


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
@settings(max_examples=draws(40, 12), deadline=None)
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


def test_an_impossible_budget_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InfeasibleBudget, match="costs") as caught:
        space(ratio=0.001, lowest=0.5)
    least = float(str(caught.value).split("network costs ")[1].split(";")[0])
    found = Space(STRUCTURES["v1"], macs, least, Limits(lowest=0.5))
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
