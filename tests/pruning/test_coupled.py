"""The coupled baseline by Torch-Pruning: our budgets and limits held, streams pruned together, outputs untouched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import long
from pruning_nets import batches, chain, images, measured_macs, residual
from torch import nn

from rmprune.errors import ConfigError, InfeasibleBudget, UnsupportedModel
from rmprune.pruning import Budget, coupled, find_structure, prune_coupled
from rmprune.pruning.coupled import COUPLED_IMPORTANCES


@pytest.mark.parametrize(("importance", "ratio"), [long("batch_norm", 0.6), ("taylor", 0.3), long("magnitude", 0.6)])
def test_macs_budget_is_hard_and_nearly_used(importance: str, ratio: float) -> None:
    model, x = residual(), images()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pruned = prune_coupled(model, x, importance=importance, budget=Budget(macs_ratio=ratio), data=batches(2))
    whole = measured_macs(model, x)
    assert 0.85 * ratio * whole <= measured_macs(pruned, x) <= ratio * whole
    assert pruned(x).shape == (2, 5) and pruned[0][0].in_channels == 3
    assert pruned[1].conv2.out_channels == pruned[0][0].out_channels  # the stream is one group
    facts = pruned.rmprune_facts
    assert facts["cut_error"] < 1e-9 and set(facts["whole"]) == {"6"}
    rows, columns = facts["kept"]["1.conv1"], facts["kept"]["0.0"]
    assert torch.equal(pruned[1].conv1.weight, model[1].conv1.weight[rows][:, columns])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in (*model.parameters(), *pruned.parameters()))


def inverted() -> nn.Module:
    """A residual around a depthwise layer."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d
    inner = [
        nn.Conv2d(8, 24, 1, bias=False),
        norm(24),
        nn.ReLU6(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
        norm(24),
    ]
    block = Shortcut(nn.Sequential(*inner, nn.ReLU6(), nn.Conv2d(24, 8, 1, bias=False), norm(8)))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU6(), block, *head).double().eval()


class Shortcut(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.branch(x)
        return found


@pytest.mark.parametrize("importance", COUPLED_IMPORTANCES)
@pytest.mark.parametrize("build", [residual, inverted])
def test_layers_may_be_fitted_to_the_whole_network_s(build: Callable[[], nn.Module], importance: str) -> None:
    """The same channels as without, whose outputs come nearer; nothing changes where nothing goes."""
    model, data = build(), [(images(64), torch.arange(64) % 5)]
    x = data[0][0]
    with torch.no_grad():
        model.train()(x)  # statistics of what comes in
        expected = model.eval()(x)
        cut, fitted = (
            prune_coupled(
                model, x[:2], importance=importance, budget=Budget(macs_ratio=0.6), data=data, reconstruct=reconstruct
            )
            for reconstruct in (False, True)
        )
        errors = [float((net(x) - expected).square().mean()) for net in (cut, fitted)]
    assert errors[1] < 0.7 * errors[0]
    assert {n: t.shape for n, t in fitted.state_dict().items()} == {n: t.shape for n, t in cut.state_dict().items()}
    kept = [net.rmprune_facts["kept"] for net in (cut, fitted)]
    assert kept[0] == kept[1] and fitted.rmprune_facts["cut_error"] < 1e-9


@pytest.mark.long
def test_limits_and_multiples() -> None:
    model, x = residual(16), images()
    model[1].bn1.weight.data[:15] *= 1e-3  # Torch-Pruning would all but empty this layer
    budget = Budget(macs_ratio=0.5, min_fraction=0.5, round_to=4)
    pruned = prune_coupled(model, x, budget=budget)
    units = find_structure(pruned, x).units
    assert units["1.conv1"] == 8
    assert all(u % 4 == 0 and u >= 0.5 * find_structure(model, x).units[n] for n, u in units.items())
    assert measured_macs(pruned, x) <= 0.5 * measured_macs(model, x)


def test_modules_may_call_anything_their_out_channels() -> None:
    model, x = residual(), images()
    model[1].out_channels, model[2].out_channels, model.out_features = [8, 16], None, (1,)
    assert measured_macs(prune_coupled(model, x, budget=Budget(macs_ratio=0.6)), x) <= 0.6 * measured_macs(model, x)


@pytest.mark.long
def test_isomorphic_ranking_takes_the_same_part_of_every_form() -> None:
    """Two streams of a form of their own, and the three layers inside blocks, of which one has the least channels of all."""
    model, x = residual(16), images()
    model[1].bn1.weight.data[:15] *= 1e-3
    forms, whole = (("0.0",), ("2.shortcut.0",), ("1.conv1", "2.conv1", "3.conv1")), find_structure(model, x).units
    spread = []
    for isomorphic in (False, True):
        left = find_structure(prune_coupled(model, x, isomorphic=isomorphic, budget=Budget(macs_ratio=0.5)), x).units
        parts = [sum(left[name] for name in form) / sum(whole[name] for name in form) for form in forms]
        spread.append(max(parts) - min(parts))
    assert spread[0] > 0.2 and spread[1] < 1 / 16


@pytest.mark.long
def test_channel_budget_and_reference() -> None:
    model, x = residual(), images()
    pruned = prune_coupled(model, x, budget=Budget(ratio=0.5))
    outputs = [sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (model, pruned)]
    assert outputs[1] <= 0.5 * outputs[0]
    half = prune_coupled(model, x, budget=Budget(macs_ratio=0.9, reference_macs=measured_macs(model, x) / 2))
    assert measured_macs(half, x) <= 0.45 * measured_macs(model, x)


def test_mode_and_frozen_parameters_are_kept() -> None:
    model = residual().train()
    model[0][0].weight.requires_grad_(False)
    pruned = prune_coupled(model, images(), budget=Budget(macs_ratio=0.5))
    assert all(m.training for m in pruned.modules()) and all(m.training for m in model.modules())
    assert not pruned[0][0].weight.requires_grad and pruned[1].conv1.weight.requires_grad


def test_refusals() -> None:
    with pytest.raises(InfeasibleBudget, match=r"min_fraction=0\.6"):  # met by cuts that leave 4 of 8 channels
        prune_coupled(residual(), images(), budget=Budget(macs_ratio=0.4, min_fraction=0.6))
    with pytest.raises(InfeasibleBudget, match=r"min_fraction=0\.5"):
        prune_coupled(residual(), images(), budget=Budget(macs_ratio=0.1, min_fraction=0.5))
    with pytest.raises(ConfigError, match="there are: batch_norm, taylor, magnitude"):
        prune_coupled(residual(), images(), importance="random", budget=Budget(ratio=0.5))
    with pytest.raises(ConfigError, match="pass data"):
        prune_coupled(residual(), images(), importance="taylor", budget=Budget(ratio=0.5))


@pytest.mark.long
def test_ties_are_broken() -> None:
    """Torch-Pruning alone removes every channel that ties with its threshold: here all but one a layer."""
    model, x = residual(), images()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    pruned = prune_coupled(model, x, budget=Budget(macs_ratio=0.4))
    assert measured_macs(pruned, x) >= 0.35 * measured_macs(model, x)
    widths = find_structure(pruned, x).units
    shares = [widths[n] / u for n, u in find_structure(model, x).units.items()]
    assert max(shares) - min(shares) < 0.2


@pytest.mark.long
@pytest.mark.parametrize("round_to", [1, 8])
def test_no_budget_that_the_limits_allow_is_refused(round_to: int) -> None:
    """Once Torch-Pruning is told to remove more than may go it removes nothing; the search must not take that for too little."""
    model, x = residual(32), images()
    whole = measured_macs(model, x)
    for ratio in (0.9, 0.3):
        budget = Budget(macs_ratio=ratio, min_fraction=0.5, round_to=round_to)
        assert 0.65 * ratio * whole < measured_macs(prune_coupled(model, x, budget=budget), x) <= ratio * whole


@pytest.mark.long
def test_the_largest_part_that_may_stay_is_held() -> None:
    model, x = residual(16), images()
    pruned = prune_coupled(model, x, budget=Budget(macs_ratio=0.9, max_fraction=0.75))
    units = find_structure(pruned, x).units
    assert all(units[name] <= 0.75 * whole for name, whole in find_structure(model, x).units.items())


@pytest.mark.long
def test_the_search_ends_where_no_ratio_takes_another_number_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And finds what looking at every number of them finds."""
    model, x, asked = chain((4, 6)), images(), []
    attempt = coupled.cut_at

    def noted(*args: Any) -> Any:
        asked.append(args[-1])
        return attempt(*args)

    monkeypatch.setattr(coupled, "cut_at", noted)
    cuts = [attempt(*_arguments(model, x, ratio))[0] for ratio in (number / 15 + 1e-6 for number in range(15))]
    costs, whole = [measured_macs(cut, x) for cut in cuts], measured_macs(model, x)
    for ratio in (0.3, 0.45, 0.6, 0.75):
        asked.clear()
        found = measured_macs(prune_coupled(model, x, budget=Budget(macs_ratio=ratio)), x)
        assert found == max(cost for cost in costs if cost <= ratio * whole) and len(asked) <= 6


def _arguments(model: nn.Module, x: torch.Tensor, ratio: float, floor: float = 0.0) -> tuple[Any, ...]:
    structure = find_structure(model, x)
    least = {name: max(1, int(floor * units)) for name, units in structure.units.items()}
    return model, x, structure, "batch_norm", False, {}, least, 1, ratio


class Backwards(nn.Module):
    """Layers in a row, registered from the last to the first: Torch-Pruning begins each group at the one that comes first."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        for name, layer in reversed(list(layers.named_children())):
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in map(str, range(len(list(self.children())))):
            x = self.get_submodule(name)(x)
        return x


def test_the_floor_of_a_group_is_its_own() -> None:
    """A group that Torch-Pruning begins at a depthwise layer names the layer behind that, too, whose own group may go down to far fewer."""
    model, x = inverted().float(), images().float()
    model[3].branch = Backwards(model[3].branch)
    for module in model[3].modules():  # most of what is expanded scores less than anything of the stream
        if isinstance(module, nn.BatchNorm2d) and module.num_features == 24:
            nn.init.uniform_(module.weight[:18], 0.001, 0.002)
    for ratio in (0.3, 0.42, 0.45):
        cut, _ = coupled.cut_at(*_arguments(model, x, ratio, floor=0.5))
        units, whole = find_structure(cut, x).units, find_structure(model, x).units
        assert all(2 * units[name] >= whole[name] for name in units) and sum(units.values()) < sum(whole.values())


@pytest.mark.long
def test_limits_refer_to_the_first_network() -> None:
    model, x = residual(16), images()
    origin = find_structure(model, x).units
    once = prune_coupled(model, x, budget=Budget(macs_ratio=0.5, min_fraction=0.5), origin=origin)
    twice = prune_coupled(once, x, budget=Budget(macs_ratio=0.75, min_fraction=0.5), origin=origin)
    units = find_structure(twice, x).units
    assert all(units[name] >= 0.5 * whole for name, whole in origin.items())


def test_without_a_batch_norm_there_is_no_scale_to_rank_by() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    head = nn.Sequential(*plain, nn.Linear(8, 5).double()).eval()
    with pytest.raises(UnsupportedModel, match="no batch norm to rank channels by"):
        prune_coupled(head, images(), budget=Budget(macs_ratio=0.5))
    assert measured_macs(prune_coupled(head, images(), importance="magnitude", budget=Budget(ratio=0.5)), images()) > 0
