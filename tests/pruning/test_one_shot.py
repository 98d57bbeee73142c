"""The public `prune`: hard budgets, dead channels first and free, compensation, and the argument left alone."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import few, long
from pruning_nets import Untraceable, batches, chain, conv, images, kill, measured_macs, mobile_chain, residual, shared
from torch import nn

from rmprune.artifact.files import load, save
from rmprune.errors import ConfigError, InfeasibleBudget, UnsupportedModel
from rmprune.measure.cost import count_macs
from rmprune.pruning import Budget, find_structure, prune
from rmprune.pruning.groups import total_cost
from rmprune.pruning.importance import score_groups
from rmprune.removal import remove_residuals


@pytest.mark.parametrize("build", few([chain, mobile_chain, residual], chain, residual))
@pytest.mark.parametrize("which", few(["free", "inner", "uniform"], "free"))
def test_macs_budget_is_met_by_the_pruned_network(build: object, which: str) -> None:
    model, x = build(), images()  # type: ignore[operator]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pruned = prune(model, x, importance="magnitude", budget=Budget(macs_ratio=0.6), which=which)  # type: ignore[arg-type]
    assert measured_macs(pruned, x) <= 0.6 * measured_macs(model, x)
    assert pruned(x).shape == model(x).shape
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert isinstance(pruned, type(model)) and pruned.training is model.training


def test_ratio_counts_channels() -> None:
    model, x = chain(), images()
    pruned = prune(model, x, budget=Budget(ratio=0.5))
    assert sum(find_structure(pruned, x).units.values()) == 18


def test_the_cost_of_the_allocator_is_the_one_that_is_reported() -> None:
    for build in (chain, mobile_chain, residual):
        assert count_macs(build(), images(1)) == total_cost(find_structure(build(), images(1)))


def test_dead_channels_go_first_and_for_nothing() -> None:
    """As many channels as are dead: the pruned network computes the same."""
    model, x = chain(kernel=1), images()
    kill(model, "1", [0, 1, 6, 7], 0.6)
    kill(model, "4", [1, 2, 3, 4, 9], -0.4)
    pruned = prune(model, x, importance="random", budget=Budget(ratio=9 / 36))
    assert find_structure(pruned, x).units == {"0": 4, "3": 7, "6": 16}
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-11, atol=1e-11)


def test_what_a_cut_leaves_unread_goes_too_and_the_budget_is_still_used() -> None:
    """Half of layer 0 is read by one channel each: when that goes they go, which must not leave the budget unused."""
    model, x = chain((24, 24, 24)), images()
    model[3].weight.data[:, :12] = 0
    model[3].weight.data[range(12), range(12)] = 1
    table = {"0": torch.ones(24), "3": torch.cat([torch.zeros(12), torch.ones(12)]), "6": torch.ones(24)}
    pruned = prune(model, x, importance=table, budget=Budget(macs_ratio=0.7), rank="importance")
    assert 0.66 * measured_macs(model, x) <= measured_macs(pruned, x) <= 0.7 * measured_macs(model, x)
    assert find_structure(pruned, x).units["0"] < 24 > find_structure(pruned, x).units["3"]
    once = prune(model, x, importance=table, budget=Budget(macs_ratio=0.7), rank="importance", nearest=False)
    assert measured_macs(once, x) < 0.66 * measured_macs(model, x)  # for a search, which measures what it gets


def test_table_of_scores_follows_the_dead() -> None:
    model, x = chain(kernel=1), images()
    kill(model, "1", [0, 1], 0.6)
    table = {"0": torch.arange(8), "3": torch.arange(12) + 100, "6": torch.arange(16) + 100}
    pruned = prune(model, x, importance=table, budget=Budget(ratio=4 / 36))
    assert torch.equal(pruned[0].weight, model[0].weight[4:])


def test_limits_and_multiples_hold_with_dead_channels() -> None:
    model, x = chain((16, 24, 32)), images()
    kill(model, "1", list(range(13)), 0.0)
    budget = Budget(macs_ratio=0.5, min_fraction=0.3, round_to=4)
    pruned = prune(model, x, budget=budget)
    units = find_structure(pruned, x).units
    assert all(u % 4 == 0 for u in units.values()) and units["0"] >= 8 and units["3"] >= 8 and units["6"] >= 12
    assert measured_macs(pruned, x) <= 0.5 * measured_macs(model, x)


def test_compensation_keeps_the_mean() -> None:
    """Folding the means of removed live channels brings the outputs nearer, and nothing else differs."""
    model, data = chain((24, 24), kernel=1), batches(4)
    x = torch.cat([x for x, _ in data])
    errors = []
    for compensate in (True, False):
        pruned = prune(model, x, importance="random", budget=Budget(ratio=0.3), data=data, compensate=compensate)
        with torch.no_grad():
            errors.append(float((pruned(x) - model(x)).square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_readers_without_bias_and_norm_are_given_a_bias_for_what_went() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 2, 1))
    model = model.double().eval()
    x = images(6)
    scores = {"0": torch.arange(8.0), "2": torch.ones(6) * 100}
    how = {"importance": scores, "budget": Budget(ratio=0.2), "data": [(x, torch.zeros(6).long())]}
    pruned, bare = prune(model, x, **how), prune(model, x, **how, compensate=False)
    assert pruned[0].out_channels < 8 and pruned[2].out_channels == 6 and bare[2].bias is None
    with torch.no_grad():
        torch.testing.assert_close(pruned[:3](x).mean((0, 2, 3)), model[:3](x).mean((0, 2, 3)))
    whole = prune(model, x, importance=scores, budget=Budget(ratio=0.2))  # of no data nothing is known
    assert whole[2].bias is None


@pytest.mark.parametrize(
    ("build", "part"), [long(chain, 0.5), long(mobile_chain, 0.9), (residual, 0.7), long(shared, 0.9)]
)
def test_reconstruction_brings_unseen_outputs_nearer_under_the_same_budget(
    build: Callable[[], nn.Module], part: float
) -> None:
    model, x = build(), torch.cat([images(64, seed=100), images(64, seed=101)])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    errors = []
    for reconstruct in (True, False):
        budget = Budget(macs_ratio=0.6)
        pruned = prune(model, x[:2], importance="random", budget=budget, data=batches(40), reconstruct=reconstruct)
        assert measured_macs(pruned, x[:2]) <= 0.6 * measured_macs(model, x[:2])
        assert all(p.requires_grad for p in pruned.parameters())
        with torch.no_grad():
            errors.append(float((pruned(x) - model(x)).square().mean()))
    assert errors[0] < part * errors[1]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_what_is_used_more_than_once_is_left_as_it_was_cut(caplog: pytest.LogCaptureFixture) -> None:
    model = shared()
    cut, fitted = (
        prune(model, images(), importance="magnitude", budget=Budget(macs_ratio=0.6), data=batches(8), reconstruct=r)
        for r in (False, True)
    )
    assert "used or shared more than once, and left as cut: norm, again, one.0, other.0" in caplog.text
    same = {n for n, t in fitted.named_parameters() if torch.equal(t, cut.get_parameter(n))}
    assert {"again.weight", "again.bias", "one.0.weight", "slope.weight"} <= same
    assert not {"turn.weight", "last.0.weight", "head.weight"} & same
    assert torch.equal(fitted.norm.running_mean, cut.norm.running_mean)


def test_reconstruction_makes_up_exactly_for_channels_that_others_hold() -> None:
    """Every second channel doubles its neighbour, whose readers' weights can be doubled in turn: nothing is lost."""
    model, data = chain((8, 12)), batches(20)
    with torch.no_grad():
        model[0].weight[1::2] = model[0].weight[::2]
        for tensor in (model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
            tensor[1::2] = tensor[::2]
    table = {"0": torch.tensor([1.0, 0.0]).repeat(4), "3": torch.full((12,), 2.0)}
    budget = Budget(ratio=4 / 20)
    pruned = prune(model, data[0][0], importance=table, rank="importance", budget=budget, data=data, reconstruct=True)
    assert find_structure(pruned, data[0][0]).units == {"0": 4, "3": 12}
    with torch.no_grad():
        assert float((pruned(images(3, seed=9)) - model(images(3, seed=9))).abs().max()) < 1e-2
        assert (
            float(
                (
                    prune(model, data[0][0], importance=table, rank="importance", budget=budget)(images(3, seed=9))
                    - model(images(3, seed=9))
                )
                .abs()
                .max()
            )
            > 0.1
        )


@pytest.mark.long
def test_reconstruction_where_a_cut_leaves_channels_unread() -> None:
    """What goes with the cut is not fitted, so that it cannot come back and break the budget."""
    model, data = chain((24, 24, 24)), batches(20)
    model[3].weight.data[:, :12] = 0
    model[3].weight.data[range(12), range(12)] = 1
    kill(model, "4", [20, 21])
    table = {"0": torch.ones(24), "3": torch.cat([torch.zeros(12), torch.ones(12)]), "6": torch.ones(24)}
    x = data[0][0]
    widths = []
    for reconstruct in (True, False):
        budget = Budget(macs_ratio=0.7)
        pruned = prune(model, x, importance=table, budget=budget, rank="importance", data=data, reconstruct=reconstruct)
        assert measured_macs(pruned, x) <= 0.7 * measured_macs(model, x)
        widths.append(find_structure(pruned, x).units)
    assert widths[0] == widths[1] and widths[0]["0"] < 24


@pytest.mark.parametrize("reconstruct", few([True, False], True))
@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training: bool, reconstruct: bool) -> None:
    model, budget = chain().train(training), Budget(macs_ratio=0.5)
    pruned = prune(model, images(), importance="taylor", budget=budget, data=iter(batches(2)), reconstruct=reconstruct)
    assert model.training is training and all(m.training is training for m in pruned.modules())


def test_errors(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InfeasibleBudget, match=r"min_fraction=0\.9"):
        prune(chain(), images(), budget=Budget(macs_ratio=0.2, min_fraction=0.9))
    assert not caplog.records  # no word of another form of the network, which would be no narrower
    with pytest.raises(ConfigError, match="which must be"):
        prune(chain(), images(), budget=Budget(ratio=0.5), which="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give some as data"):
        prune(chain(), images(), budget=Budget(ratio=0.5), reconstruct=True)
    with pytest.raises(UnsupportedModel, match="control flow"):
        prune(Untraceable(), images(), budget=Budget(ratio=0.5))
    with pytest.raises(ConfigError, match="no entry for 0"):
        prune(chain(), images(), budget=Budget(ratio=0.5), importance={"nowhere": torch.ones(3)})


def test_a_flat_result_of_stock_modules() -> None:
    pruned = prune(chain(), images(), budget=Budget(macs_ratio=0.3))
    assert type(pruned) is nn.Sequential
    assert [type(m) for m in pruned] == [type(m) for m in chain()]


@pytest.mark.long
def test_a_table_may_name_layers() -> None:
    model, x = residual(), images()
    norms = {n: torch.rand(m.num_features) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    groups = score_groups(norms, model, find_structure(model, x))
    by_layer, by_group = (prune(model, x, importance=table, budget=Budget(macs_ratio=0.5)) for table in (norms, groups))
    assert find_structure(by_layer, x).units == find_structure(by_group, x).units
    assert torch.equal(by_layer(x), by_group(x))


@pytest.mark.long
def test_the_result_says_what_it_kept_and_goes_on_saying_it(tmp_path: Path) -> None:
    """Numbers refer to the first network, also after a second cut, a copy, and a way over the disk."""
    model, x = chain(), images()
    once = prune(model, x, importance="random", budget=Budget(ratio=0.3, min_fraction=0.4))
    twice = copy.deepcopy(prune(once, x, importance="random", budget=Budget(ratio=0.3, min_fraction=0.4)))
    facts = twice.rmprune_facts
    kept = facts["kept"]
    assert 1 < len(kept["3"]) < len(once.rmprune_facts["kept"]["3"]) < 12
    assert torch.equal(twice[3].weight, model[3].weight[kept["3"]][:, kept["0"]])  # type: ignore[index]
    assert kept["4"] == kept["3"] and "9" not in kept and "output" in facts["whole"]["11"]
    assert 0 < facts["cut_error"] < 1e-9
    assert load(save(twice, tmp_path / "net")).rmprune_facts == facts  # type: ignore[comparison-overlap]
    plain = remove_residuals(residual(), x).model
    assert copy.deepcopy(prune(plain, x, importance="random", budget=Budget(ratio=0.3))).rmprune_facts["kept"]


def test_modules_that_are_ignored_stay_whole() -> None:
    model, x = residual(), images()
    pruned = prune(model, x, importance="magnitude", budget=Budget(macs_ratio=0.8), ignore=["1", "2.bn1"])
    widths = {name: part.out_channels for name, part in pruned.named_modules() if isinstance(part, nn.Conv2d)}
    assert [widths[name] for name in ("0.0", "1.conv1", "1.conv2", "2.conv1")] == [8, 8, 8, 16]
    assert widths["3.conv1"] < 16 and pruned.rmprune_facts["whole"]["2.conv1"] == "ignore='2.bn1'"  # type: ignore[operator]
    with pytest.raises(UnsupportedModel, match="nothing can be pruned: ignore"):
        prune(chain(), x, budget=Budget(ratio=0.5), ignore=["0", "3", "6"])


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no budget": ({"budget": None}, "budget says what to meet"),
    "a layer, not its name": ({"ignore": [nn.ReLU()]}, "ignore is a list of names; got ReLU"),
    "a module, not its name": ({"ignore": nn.ReLU()}, "ignore is a list of names; got ReLU"),
    "origin": ({"origin": {"typo": 3}}, "origin names 'typo', which is no group of channels; there are: 0, 3"),
    "begin": ({"begin": {"11": 3}}, "begin names '11'"),
    "a short table": ({"importance": {"0": torch.ones(5), "3": torch.ones(12)}}, r"importance of 0: .* 8 numbers, .* shape \(5,\)"),
    "no tensor": ({"importance": {"0": [1.0] * 8, "3": torch.ones(12)}}, "importance of 0: .* got list"),
    "a cost of NaN": ({"budget": Budget(latency_ratio=0.5), "cost": lambda layer, cin, cout: math.nan}, "cost of layer 0 .* nan"),
    "a cost of NaN for some": (
        {"budget": Budget(latency_ratio=0.5), "cost": lambda layer, cin, cout: math.inf if cin == 5 else cin * cout}, "is inf"
    ),
    "no cost": ({"budget": Budget(latency_ratio=0.5, reference_ms=1.0), "cost": lambda layer, cin, cout: None}, "is nan"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_error(mistake: str) -> None:
    settings, says = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=says):
        prune(chain(), images(), **{"budget": Budget(ratio=0.5), "importance": "magnitude"} | settings)


@pytest.mark.parametrize(("ignore", "whole"), [("3", {"3", "11"}), (None, {"11"}), ((n for n in ["3"]), {"3", "11"})])
def test_one_name_is_one_and_none_is_none(ignore: Any, whole: set[str]) -> None:
    pruned = prune(chain(), images(), importance="magnitude", budget=Budget(ratio=0.2), ignore=ignore, prove=False)
    assert set(pruned.rmprune_facts["whole"]) == whole  # type: ignore[arg-type]


def test_a_layer_in_the_place_of_one_that_was_cut_is_counted_anew() -> None:
    pruned = prune(chain(), images(), importance="random", budget=Budget(ratio=0.5))
    pruned[0], pruned[1] = conv(3, 9).double(), nn.BatchNorm2d(9).double()
    pruned[3] = conv(9, len(pruned[3].weight)).double()  # type: ignore[arg-type]
    again = prune(pruned.eval(), images(), importance="random", budget=Budget(ratio=0.3), dead=False)
    kept: dict[str, list[int]] = again.rmprune_facts["kept"]  # type: ignore[index, assignment]
    assert torch.equal(again[0].weight, pruned[0].weight[kept["0"]]) and max(kept["3"]) < 12  # type: ignore[index]


@pytest.mark.parametrize("name, says", [("0.con", "no module"), ("2", "no channels of its own"), ("", "no module")])
def test_what_is_ignored_must_be_there(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prune(chain(), images(), budget=Budget(ratio=0.5), ignore=[name])
