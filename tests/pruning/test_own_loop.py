"""Cuts in loops that are not ours: the optimizer stays the same object and goes on as if it had always been small."""

from typing import Any

import numpy as np
import pytest
import torch
from marks import few, long
from pruning_nets import images, residual
from torch import nn

import rmprune
from rmprune.errors import ConfigError, DataError, InfeasibleBudget, NotEquivalent, UnsupportedModel

HALF = rmprune.Budget(macs_ratio=0.5, min_fraction=0.2)
LABELS = torch.arange(8) % 5


def one_step(pruner: rmprune.Pruner) -> bool:
    pruner.optimizer.zero_grad()
    nn.functional.cross_entropy(pruner.model.train()(images(8)), LABELS).backward()
    pruner.optimizer.step()
    return pruner.step()


@pytest.mark.parametrize("kind", few(["AdamW", "SGD"], "AdamW"))
def test_optimizer_and_schedule_follow_the_cuts(kind: str) -> None:
    model = residual()
    whole = rmprune.count_macs(model, images(1))
    momentum: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-2, **momentum)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    pruner = rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=4, cuts=2)
    assert pruner.model is model and pruner.cut_error < 1e-9
    cut = []
    for _ in range(6):
        cut.append(one_step(pruner))
        schedule.step()
    assert cut == [False, True, False, True, False, False] and pruner.done and pruner.model is not model
    assert rmprune.count_macs(pruner.model, images(1)) <= 0.5 * whole == 0.5 * rmprune.count_macs(model, images(1))
    own = {id(p) for p in pruner.model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own == {*map(id, optimizer.state)}
    for parameter, state in optimizer.state.items():
        assert all(v.shape in (parameter.shape, ()) for v in state.values() if isinstance(v, torch.Tensor))
    assert optimizer.param_groups[0]["lr"] == 1e-2 * 0.5**6


def test_momentum_is_that_of_the_channels_that_stay() -> None:
    """After a cut the next step is the one that the kept weights would have made: SGD's buffers, sliced with the same indices."""
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    pruner = rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=1)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer.zero_grad()
    nn.functional.cross_entropy(model.train()(images(8)), LABELS).backward()
    optimizer.step()
    before = {names[id(p)]: (p.detach().clone(), s["momentum_buffer"].clone()) for p, s in optimizer.state.items()}
    assert pruner.step()
    weight, momentum = before["0.0.weight"]
    now = pruner.model.get_parameter("0.0.weight")
    rows = [int((weight == row).flatten(1).all(1).nonzero()[0]) for row in now]
    assert len(rows) < len(weight) and torch.equal(optimizer.state[now]["momentum_buffer"], momentum[rows])


@pytest.mark.parametrize(
    ("steps", "cuts", "at"), [long(10, 4, {3, 5, 8, 10}), (7, 5, {2, 3, 5, 6, 7}), long(2, 30, {1, 2})]
)
def test_as_many_cuts_as_asked_for_evenly(steps: int, cuts: int, at: set[int]) -> None:
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    budget = rmprune.Budget(ratio=0.5)
    pruner = rmprune.Pruner(model, images(2), budget, optimizer=optimizer, steps=steps, cuts=cuts, importance="random")
    assert {step for step in range(1, steps + 3) if pruner.step()} == at and pruner.done
    facts: dict[str, Any] = pruner.model.rmprune_facts  # type: ignore[assignment]
    assert pruner.cut_error >= facts["cut_error"] and set(facts["whole"]) == {"6"}
    kept = facts["kept"]["0.0"]
    assert torch.equal(pruner.model.get_parameter("0.0.weight"), model.get_parameter("0.0.weight")[kept])


def test_the_last_network_is_compared_with_the_first() -> None:
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=2, cuts=2, importance="magnitude")
    assert pruner.step() and pruner.step()
    before = pruner.model.rmprune_facts["cut_error"]  # type: ignore[index]
    assert pruner._hook.proved(pruner.model) == before < 1e-12
    name, index = next(iter(pruner._hook.kept.items()))
    pruner._hook.kept[name] = index[1:]  # as if another of its channels had gone
    with pytest.raises(NotEquivalent, match=r"is not what the cuts leave of it"):
        pruner._hook.proved(pruner.model)


def test_a_step_that_a_scaler_skips_counts_for_nothing() -> None:
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=3)
    one_step(pruner)
    before = {name: score.clone() for name, score in pruner._hook.scores.scores.items()}
    for parameter in pruner.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    pruner._hook.scores.update(pruner.model)
    after = pruner._hook.scores.scores
    assert all(bool(after[name].isfinite().all()) and torch.equal(after[name], before[name]) for name in before)


def test_mistakes_are_said_at_once() -> None:
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(ConfigError, match="holds no parameter of this model"):
        rmprune.Pruner(residual(), images(2), HALF, optimizer=optimizer, steps=4)
    with pytest.raises(ConfigError, match="optimizer is of type NoneType"):
        rmprune.Pruner(model, images(2), HALF, optimizer=None, steps=4)  # type: ignore[arg-type]
    normed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    torch.nn.utils.parametrizations.weight_norm(normed[0])
    with pytest.raises(UnsupportedModel, match="computed from others"):
        rmprune.Pruner(normed, images(2), HALF, optimizer=torch.optim.SGD(normed.parameters()), steps=4)
    with pytest.raises(ConfigError, match="give ratio or macs_ratio"):
        rmprune.Pruner(model, images(2), rmprune.Budget(latency_ratio=0.5), optimizer=optimizer, steps=4)
    with pytest.raises(InfeasibleBudget):
        narrow = rmprune.Budget(macs_ratio=0.1, min_fraction=0.9)
        rmprune.Pruner(model, images(2), narrow, optimizer=optimizer, steps=4)
    pruner = rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=1)
    with pytest.raises(DataError, match="before the gradients are cleared"):
        pruner.step()


def test_what_the_optimizer_leaves_out_is_refused() -> None:
    """A cut makes every parameter anew: a second optimizer would go on with those of before."""
    model = residual()
    *others, head = model.parameters()
    with pytest.raises(ConfigError, match=r"does not hold 1 of the parameters that are trained \(6\.bias\)"):
        rmprune.Pruner(model, images(2), HALF, optimizer=torch.optim.SGD(others, lr=1e-2), steps=4)
    head.requires_grad_(False)
    rmprune.Pruner(model, images(2), HALF, optimizer=torch.optim.SGD(others, lr=1e-2), steps=4)


def test_what_leaves_no_gradients_to_rank_by_is_refused_at_once() -> None:
    model = residual()
    nesterov = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True, foreach=True)
    with pytest.raises(ConfigError, match="give it foreach=False"):  # its weight_decay is 0
        rmprune.Pruner(model, images(2), HALF, optimizer=nesterov, steps=4)
    model[6].requires_grad_(False)
    trained = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(ConfigError, match=r"and 6 have none \(requires_grad is False\)"):
        rmprune.Pruner(model, images(2), HALF, optimizer=trained, steps=4)
    rmprune.Pruner(model, images(2), HALF, optimizer=trained, steps=4, importance="magnitude")


def test_a_block_that_a_step_skips_has_no_effect_in_it() -> None:
    """Stochastic depth: no gradient at all is an effect of 0, and the step counts for the others."""
    pruner = rmprune.Pruner(
        model := residual(), images(2), HALF, optimizer=torch.optim.SGD(model.parameters()), steps=60
    )
    one_step(pruner)
    scores = pruner._hook.scores
    before = {name: score.clone() for name, score in scores.scores.items()}
    readers = {g.name: {m.layer for m in g.readers} for g in scores.structure.groups}
    skipped = next(layer for layers in readers.values() for layer in layers if len(layers) == 1)
    pruner.model.get_submodule(skipped).weight.grad = None
    assert scores.update(pruner.model)
    alone = {name for name, layers in readers.items() if layers == {skipped}}
    assert alone and all(torch.equal(scores.scores[n], before[n]) == (n in alone) for n in before)
    pruner.model.zero_grad()
    assert not scores.update(pruner.model)


def test_adafactors_rows_and_columns_are_those_of_the_channels_that_stay() -> None:
    model = residual()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    pruner = rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=3, cuts=1)
    assert not one_step(pruner) and not one_step(pruner)
    weight, before = model.get_parameter("0.0.weight"), {}
    optimizer.register_step_post_hook(
        lambda *_: before.update({k: v.clone() for k, v in optimizer.state.get(weight, {}).items()})
    )
    assert one_step(pruner)
    kept = pruner.model.rmprune_facts["kept"]["0.0"]  # type: ignore[index]
    now = optimizer.state[pruner.model.get_parameter("0.0.weight")]
    assert len(kept) < len(weight) and all(torch.equal(now[key], before[key][kept]) for key in ("row_var", "col_var"))
    assert not one_step(pruner) and float(now["step"]) == 4


class Blocks(torch.optim.SGD):
    """Keeps a matrix for each side of a weight, as Shampoo, or a number for each block of a flat one, as 8-bit optimizers."""

    sizes = staticmethod(lambda p: (len(p), len(p)))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(count=0, side=[p.new_ones(self.sizes(p))])
                assert state["side"][0].shape == self.sizes(p)
                state["count"] += 1
        super().step()


@pytest.mark.parametrize("sizes", [lambda p: (len(p), len(p)), lambda p: (p.numel(),), lambda p: (-(-p.numel() // 8),)])
def test_state_of_another_form_begins_anew_and_is_named(sizes: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = residual()
    optimizer = Blocks(model.parameters(), lr=1e-3)
    optimizer.sizes = sizes  # type: ignore[method-assign]
    pruner = rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=2, cuts=1)
    assert not one_step(pruner) and not caplog.text and one_step(pruner) and not one_step(pruner)
    assert "Blocks keeps side of sizes" in caplog.text and "begins anew" in caplog.text
    assert {state["count"] for state in optimizer.state.values()} == {1, 3}
    assert optimizer.state[pruner.model.get_parameter("0.0.weight")]["count"] == 1


class Around(torch.optim.SGD):
    def __init__(self, inside: torch.optim.Optimizer) -> None:
        super().__init__(inside.param_groups[0]["params"])
        self.inside = [inside]


def test_optimizers_that_hold_parameters_where_cuts_do_not_reach_are_refused() -> None:
    """LBFGS went on with the parameters of before the cut, without a word."""
    model = residual()
    for optimizer, told in (
        (
            torch.optim.LBFGS(model.parameters()),
            r"LBFGS keeps parameters of its own beside its param_groups \(_params\)",
        ),
        (
            Around(torch.optim.SGD(model.parameters())),
            r"Around wraps another optimizer; give the one inside, optimizer\.inside",
        ),
    ):
        with pytest.raises(ConfigError, match=told):
            rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=4)


def test_a_loop_that_goes_on_with_the_network_before_the_cut_is_told() -> None:
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=8, cuts=4)

    def step() -> bool:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(images(8)), LABELS).backward()
        optimizer.step()
        return pruner.step()

    assert [step(), step()] == [False, True]
    with pytest.raises(DataError, match=r"no gradient reached the network since the last cut.*`pruner\.model`"):
        for _ in range(2):
            step()
    assert not pruner.done


@pytest.mark.parametrize(("steps", "cuts"), [(8.0, 4), (np.int64(8), np.float64(4.0))])
def test_whole_numbers_of_other_types_count_steps(steps: Any, cuts: Any) -> None:
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=steps, cuts=cuts, importance="random")
    assert [pruner.step() for _ in range(8)] == [False, True] * 4 and pruner.done


@pytest.mark.parametrize("wrong", [7.5, "8", None, True, 0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["steps", "cuts"])
def test_what_counts_no_steps_is_one_line(name: str, wrong: Any) -> None:
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    counts: dict[str, Any] = {"steps": 8, "cuts": 4, name: wrong}
    with pytest.raises(ConfigError, match=rf"^{name} is .*; give a whole number of at least 1$"):
        rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, **counts)


class Stop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


def test_layers_that_no_gradient_reaches_are_not_taken_for_useless() -> None:
    convs = [nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(convs[0], nn.ReLU(), convs[1], Stop(), convs[2], nn.ReLU(), convs[3], *head).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = rmprune.Pruner(model, images(2), HALF, optimizer=optimizer, steps=2, cuts=1)
    assert not one_step(pruner)
    with pytest.raises(DataError, match=r"no gradient has reached what reads 0; where forward stops"):
        one_step(pruner)
