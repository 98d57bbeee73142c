"""Residuals go where the measured time says so; the function stays what it was."""

import pytest
import torch
from removal_nets import basic, images, prepared
from torch import nn

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


def test_a_plain_network_is_left_as_it_is() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    removal = remove_where_faster(plain, torch.randn(1, 3, 8, 8), lambda networks: pytest.fail("measured"))
    assert removal.model is plain and (removal.removed, removal.kept) == ([], {})
