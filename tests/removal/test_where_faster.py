"""Residuals go where the measured time says so; the function stays what it was."""

from collections.abc import Callable, Mapping

import pytest
import torch
from marks import few
from removal_nets import Residual, ThreeWays, basic, conv_bn, has_addition, images, prepared, worst_error
from torch import fx, nn

from rmprune.removal import remove_where_faster
from rmprune.removal.remove import plan_removal


def network() -> nn.Sequential:
    return prepared(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), basic(), basic(), nn.AdaptiveAvgPool2d(1))


def ratios(*removed: float):
    """Made-up times of the network after removal, in the order of asking; with its residuals it takes 1."""
    times = iter(removed)
    return lambda networks: {"kept": 1.0, "removed": next(times)}


@pytest.mark.parametrize("cheap", [0, 1])
def test_only_the_residual_that_pays_goes(cheap: int) -> None:
    model = network()
    removal = remove_where_faster(model, images(), ratios(*([0.9, 1.1] if cheap == 0 else [1.1, 0.9]), 0.9))
    result, gone = removal.model, removal.removed
    assert len(plan_removal(result, images())) == 1
    assert gone == [plan_removal(model, images())[cheap].name]
    widened = [m.out_channels for m in result.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 12]
    first = [m for m in result.modules() if isinstance(m, nn.Conv2d)][1]
    assert len(widened) == 1 and (first.out_channels == 12) == (cheap == 0)
    assert (result(images()) - model(images())).abs().max() < 1e-12


@pytest.mark.parametrize("time", [0.995, 1.2])
def test_where_none_pays_the_network_is_left_as_it_is(time: float) -> None:
    model = network()
    removal = remove_where_faster(model, images(), lambda networks: {"kept": 1.0, "removed": time})
    assert removal.model is model and removal.removed == [] and len(removal.kept) == 2


def test_those_that_pay_alone_but_not_together_stay() -> None:
    model = network()
    assert remove_where_faster(model, images(), ratios(0.9, 0.9, 1.1)).model is model


def test_what_does_not_fit_stays_and_is_not_measured() -> None:
    model = network()
    nothing = remove_where_faster(model, images(), lambda networks: pytest.fail("measured"), lambda network: False)
    assert nothing.model is model and nothing.removed == []
    assert set(nothing.kept.values()) == {"the rows that its removal reserves do not fit the budget"}


def test_the_reason_that_a_residual_stays_is_what_decided() -> None:
    model, rows = network(), "the rows that its removal reserves do not fit the budget"
    first, second = (block.name for block in plan_removal(model, images()))
    slow = "without it the network is no faster"
    one = remove_where_faster(model, images(), ratios(0.9, 1.1, 0.9))
    assert (one.removed, one.kept) == ([first], {second: slow})
    asked = remove_where_faster(model, images(), ratios(0.9, 0.9), keep=[second])
    assert asked.kept == {second: "kept, as asked for"}
    own = iter([True, False, True])
    dear = remove_where_faster(model, images(), ratios(0.9, 0.9), lambda _: next(own))
    assert (dear.removed, dear.kept) == ([first], {second: rows})
    own = iter([True, True, False])  # each, but not both
    both = remove_where_faster(model, images(), ratios(0.9, 0.9), lambda _: next(own))
    assert (both.removed, both.kept) == ([], {first: rows, second: rows})


def test_a_plain_network_is_left_as_it_is() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    removal = remove_where_faster(plain, torch.randn(1, 3, 8, 8), lambda networks: pytest.fail("measured"))
    assert removal.model is plain and (removal.removed, removal.kept) == ([], {})


def nested() -> Residual:
    """The outer addition cannot go while the inner one stays."""
    return Residual(nn.Sequential(*conv_bn(6, 6), nn.ReLU(), basic(), *conv_bn(6, 6)), None, nn.ReLU())


def chained(block: Callable[[], nn.Module]) -> nn.Sequential:
    return prepared(*conv_bn(3, 6), nn.ReLU(), block(), block(), basic())


def left(network: nn.Module) -> int:
    """How many additions a network has."""
    graph = network.graph if isinstance(network, fx.GraphModule) else fx.symbolic_trace(network).graph
    return sum("add" in node.name for node in graph.nodes)


@pytest.mark.parametrize("block", few([ThreeWays, nested], nested))
@pytest.mark.parametrize("needed", few([1, 2], 1))
def test_a_residual_that_cannot_go_alone_is_tried_with_those_before_it(
    block: Callable[[], nn.Module], needed: int
) -> None:
    """Made-up times that fall with every addition from the second one on, or from the first."""
    model = chained(block)
    asked = []

    def times(networks: Mapping[str, nn.Module]) -> dict[str, float]:
        asked.append(left(networks["kept"]) - left(networks["removed"]))
        return {"kept": 1.0, "removed": 0.9 ** asked[-1] if asked[-1] >= needed else 1.1}

    removal = remove_where_faster(model, images(), times)
    assert asked == [1, 2, 1, 2, 1, 5 if needed == 1 else 4]
    assert has_addition(removal.model) == (needed == 2) and len(removal.removed) == asked[-1]
    assert worst_error(removal, model) < 1e-12


@pytest.mark.parametrize("block", few([ThreeWays, nested], ThreeWays))
def test_where_none_of_a_chain_pays_the_network_is_left_as_it_is(block: Callable[[], nn.Module]) -> None:
    model = chained(block)
    removal = remove_where_faster(model, images(), lambda networks: {"kept": 1.0, "removed": 1.0})
    assert removal.model is model and removal.removed == [] and len(removal.kept) == 5


def test_a_residual_that_only_slows_what_those_before_it_gain_stays() -> None:
    model = prepared(*conv_bn(3, 6), nn.ReLU(), nested())
    removal = remove_where_faster(model, images(), ratios(0.9, 0.95, 0.9))
    assert removal.removed == ["3.branch.3"] and worst_error(removal, model) < 1e-12
