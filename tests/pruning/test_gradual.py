"""Cuts while training: the target is reached on schedule, limits and multiples hold, and a run goes on where it was."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from marks import few
from pruning_nets import chain, images, measured_macs, residual
from torch import nn

from rmprune.errors import ArtifactError, ConfigError, InfeasibleBudget
from rmprune.pruning import Budget, GradualPruner, find_structure
from rmprune.pruning.groups import total_cost


@dataclass
class State:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    total_steps: int = 60
    steps_per_epoch: int = 20


def new_state(model: nn.Module) -> State:
    model.train()
    return State(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True))


def train(state: State, hook: GradualPruner, steps: int) -> list[float]:
    """Ordinary steps with the hook after each; returns the MACs after each."""
    macs = []
    for _ in range(steps):
        x = images(8, seed=state.step)
        y = torch.randint(5, (8,), generator=torch.Generator().manual_seed(state.step))
        state.optimizer.zero_grad()
        F.cross_entropy(state.model(x), y).backward()
        state.optimizer.step()
        state.step += 1
        hook(state)
        macs.append(total_cost(hook.structure))
    return macs


BUDGET = Budget(macs_ratio=0.3, min_fraction=0.25, round_to=2)


@pytest.mark.parametrize("build", few([chain, residual], chain))
def test_reaches_the_budget_on_schedule(build: object) -> None:
    model, x = build(), images()  # type: ignore[operator]
    whole, first = measured_macs(model, x), find_structure(model, x)
    state = new_state(build())  # type: ignore[operator]
    hook = GradualPruner(state.model, x, BUDGET, prune_epochs=2, every=5)
    macs = train(state, hook, 60)
    assert hook.done and hook.cuts == 8  # 40 steps, one cut in 5
    assert macs[3] == whole and macs[4] < whole
    for cut in range(8):  # geometric, and never below what is due but for the size of one channel
        due = whole * 0.3 ** ((cut + 1) / 8)
        assert 0.8 * due <= macs[5 * cut + 4] <= due
    assert macs[39] == macs[-1] == measured_macs(state.model, x) <= 0.3 * whole
    for group in hook.structure.groups:
        before = first.group(group.name).units
        assert group.units % 2 == 0 and group.units >= 0.25 * before
    now = find_structure(state.model, x)
    assert now.units == hook.structure.units and now.layers == hook.structure.layers
    assert {id(p) for g in state.optimizer.param_groups for p in g["params"]} == {
        id(p) for p in state.model.parameters()
    }


@pytest.mark.parametrize("importance", few(["batch_norm", "magnitude", "random"], "magnitude"))
def test_other_criteria_at_each_cut(importance: str) -> None:
    state = new_state(residual())
    hook = GradualPruner(state.model, images(), BUDGET, prune_epochs=0.5, every=5, importance=importance)
    train(state, hook, 10)
    assert hook.done and measured_macs(state.model, images()) <= 0.3 * measured_macs(residual(), images())
    with pytest.raises(ConfigError, match="needs data"):
        GradualPruner(residual(), images(), BUDGET, prune_epochs=1, importance="activation")


@pytest.mark.long
def test_channel_budget_against_the_original_and_at_the_last_step() -> None:
    """Training that is shorter than prune_epochs still ends on the budget; ratio counts channels."""
    state = new_state(chain())
    hook = GradualPruner(state.model, images(), Budget(ratio=0.5), prune_epochs=99, every=7)
    train(state, hook, 60)
    assert hook.done and sum(hook.structure.units.values()) == 18
    few = new_state(chain())
    few.total_steps = 3
    late = GradualPruner(few.model, images(), Budget(ratio=0.5), prune_epochs=1, every=30)
    train(few, late, 3)
    assert late.done and sum(late.structure.units.values()) == 18


def test_reference_below_the_present_cost() -> None:
    """A plain network may cost more than the original: the first cuts bring it down to the original's scale."""
    whole = measured_macs(chain(), images())
    state = new_state(chain())
    hook = GradualPruner(
        state.model, images(), Budget(macs_ratio=0.8, reference_macs=whole / 2), prune_epochs=1, every=5
    )
    train(state, hook, 20)
    assert measured_macs(state.model, images()) <= 0.4 * whole


@functools.cache
def straight() -> nn.Module:
    state = new_state(residual())
    train(state, GradualPruner(state.model, images(), BUDGET, prune_epochs=2, every=10), 60)
    return state.model


@pytest.mark.parametrize("stop", few([12, 45], 12))
def test_goes_on_after_an_interruption_exactly(stop: int) -> None:
    broken = new_state(residual())
    first = GradualPruner(broken.model, images(), BUDGET, prune_epochs=2, every=10)
    train(broken, first, stop)
    saved = first.state_dict()
    assert all(isinstance(v, int | float | dict) for v in saved.values())

    second = GradualPruner(residual(), images(), BUDGET, prune_epochs=2, every=10)
    second.load_state_dict(saved)
    fresh = copy.deepcopy(broken.model)
    state = new_state(fresh)
    state.step = stop
    for old, new in zip(broken.model.parameters(), fresh.parameters(), strict=True):
        state.optimizer.state[new] = dict(broken.optimizer.state[old])
    train(state, second, 60 - stop)
    for a, b in zip(straight().state_dict().values(), state.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_network_is_refused() -> None:
    hook = GradualPruner(chain(), images(), BUDGET, prune_epochs=1)
    other = GradualPruner(residual(), images(), BUDGET, prune_epochs=1)
    with pytest.raises(ArtifactError, match="another network"):
        hook.load_state_dict(other.state_dict())


def test_an_impossible_budget_is_refused_before_training() -> None:
    with pytest.raises(InfeasibleBudget, match=r"min_fraction=0\.8"):
        GradualPruner(chain(), images(), Budget(macs_ratio=0.2, min_fraction=0.8), prune_epochs=1)


def test_channels_without_effect_go_first() -> None:
    model = chain()
    dead = [1, 4, 7, 10]
    model[6].weight.data[:, dead] = 0  # nobody reads them, nor will
    model[6].weight.register_hook(lambda g: g.index_fill(1, torch.tensor(dead), 0.0))
    state = new_state(model)
    hook = GradualPruner(model, images(), Budget(ratio=4 / 36), prune_epochs=0.5, every=10)
    train(state, hook, 10)
    assert hook.done and hook.kept["3"].tolist() == [i for i in range(12) if i not in dead]


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_so_much_of_the_scores_survives_a_cut(decay: float) -> None:
    cut, uncut = (
        GradualPruner(chain(), images(), Budget(ratio=0.5), prune_epochs=1, every=every, decay=decay)
        for every in (5, 6)
    )
    for hook in (cut, uncut):
        train(new_state(hook.whole), hook, 5)
    assert (cut.cuts, uncut.cuts) == (1, 0) and cut.structure.units != uncut.structure.units
    for name, kept in cut.kept.items():
        torch.testing.assert_close(cut.scores.scores[name], decay * uncut.scores.scores[name][kept])


def test_cuts_again_where_the_measured_network_does_not_meet_the_budget() -> None:
    """Measured, the network at its budget takes 1.25 of what it may: the next cut aims at 0.8 of the budget."""
    whole, found = measured_macs(chain(), images()), []

    def meets(model: nn.Module) -> float:
        found.append(measured_macs(model, images()))
        return found[-1] / (0.48 * whole)

    state = new_state(chain())
    hook = GradualPruner(state.model, images(), Budget(macs_ratio=0.6), prune_epochs=1, every=5, meets=meets)
    train(state, hook, 60)
    assert hook.done and found[-1] <= 0.48 * whole
    assert any(0.48 * whole < macs <= 0.6 * whole for macs in found)
    assert hook.state_dict()["limit"] < 0.6 * whole


def test_stops_cutting_once_the_measured_network_meets_the_budget() -> None:
    whole = measured_macs(chain(), images())
    state = new_state(chain())
    hook = GradualPruner(
        state.model,
        images(),
        Budget(macs_ratio=0.6),
        prune_epochs=1,
        every=3,
        meets=lambda model: measured_macs(model, images()) / (0.72 * whole),
    )
    train(state, hook, 60)
    assert hook.done
    assert 0.65 * whole < measured_macs(state.model, images()) <= 0.72 * whole


def test_after_ctrl_c_within_the_measuring_it_measures_again() -> None:
    """What a checkpoint then holds is the cut network, not yet measured: the limit becomes what it would have been."""

    def interrupted(model: nn.Module) -> float:
        if measured_macs(model, images()) > 0.6 * whole:
            return 2.0
        raise KeyboardInterrupt

    def hook_of(model: nn.Module, meets: object) -> GradualPruner:
        return GradualPruner(model, images(), Budget(macs_ratio=0.6), prune_epochs=1, every=5, meets=meets)  # type: ignore[arg-type]

    whole = measured_macs(chain(), images())
    state = new_state(chain())
    hook = hook_of(state.model, interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(state, hook, 60)
    again = hook_of(chain(), lambda model: 1.25 if measured_macs(model, images()) > 0.5 * whole else 1.0)
    again.load_state_dict(hook.state_dict())
    macs = train(state, again, 10)
    assert again.done and macs[4] <= 0.8 * 0.6 * whole < macs[3]  # five steps after the cut, as without the Ctrl-C


def test_a_network_as_narrow_as_allowed_is_not_cut_further() -> None:
    state = new_state(chain())
    budget = Budget(macs_ratio=0.35, min_fraction=0.5)
    hook = GradualPruner(state.model, images(), budget, prune_epochs=1, every=5, meets=lambda model: 2.0)
    train(state, hook, 60)
    assert hook.done
    assert all(len(hook.kept[group.name]) * 2 == group.units for group in hook.first.groups)


def test_after_ctrl_c_within_the_measuring_before_a_cut_that_cut_is_still_made() -> None:
    def interrupted(model: nn.Module) -> float:
        raise KeyboardInterrupt

    budget = Budget(macs_ratio=0.9)
    state = new_state(chain())
    hook = GradualPruner(state.model, images(), budget, prune_epochs=0.5, every=10, meets=interrupted)
    assert hook.planned_cuts(state) == 1
    with pytest.raises(KeyboardInterrupt):
        train(state, hook, 20)
    whole, step = measured_macs(state.model, images()), state.step
    again = GradualPruner(chain(), images(), budget, prune_epochs=0.5, every=10, meets=lambda model: 2.0)
    again.load_state_dict(hook.state_dict())
    train(state, again, 1)
    assert step == 10 and measured_macs(state.model, images()) <= 0.9 * whole
