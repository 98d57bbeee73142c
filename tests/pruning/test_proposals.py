"""What the surrogate takes widths to lose, and what it learns from plans that were carried out."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from marks import long
from removal_nets import basic, conv, prepared
from torch import Tensor, nn

from rmprune.pruning import find_structure
from rmprune.pruning.allocate import Meter
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.pruning.groups import total_cost
from rmprune.pruning.layers import macs
from rmprune.pruning.options import block_layers
from rmprune.pruning.plan import Choice, SlimPlan
from rmprune.pruning.proposals import LEVELS, WEIGHED, Proposals, Sight, learned, thinned
from rmprune.pruning.surrogate import _curve, _measured


class Alike(nn.Module):
    """Products of maps, which cost MACs in no layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2) @ x.flatten(2).transpose(1, 2)


def network() -> nn.Sequential:
    return prepared(conv(3, 6), nn.ReLU(), basic(), basic(), conv(6, 5, 1), Alike(), nn.Flatten(), nn.Linear(25, 4))


def written(model: nn.Module, choices: Sequence[Choice]) -> Proposals:
    """The program of a network whose blocks "2" and "3" have these choices, and groups one of two widths; nothing loses anything."""
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    removed, _ = carry_out_blocks(model, {"2": "remove", "3": "remove"}, lambda count: images[:count])
    sights: dict[Choice, Sight] = {}
    for choice, own in (("keep", model), ("remove", removed)):
        structure = find_structure(own, images[:2])
        widths = {group.name: [group.units // 2, group.units] for group in structure.groups}
        sights[choice] = Sight(structure, macs, widths, {name: [1.0, 0.0] for name in widths})
    return Proposals(sights, block_layers(model, images), {name: dict.fromkeys(choices, 0.0) for name in ("2", "3")})


def test_losses_between_the_widths_measured_go_with_the_square() -> None:
    """Nothing at the whole width, 4 at 8 of 16, and 9 at 4; where fewer units were measured to lose less, as much as with more."""
    assert _curve({8: 4.0, 4: 9.0}, 16, [4, 6, 8, 12, 16]) == pytest.approx([9.0, 6.25, 4.0, 1.0, 0.0])
    assert _curve({8: 4.0, 4: 1.0}, 16, [4, 8, 16]) == pytest.approx([4.0, 4.0, 0.0])


def test_widths_to_choose_among_are_close_where_groups_are_narrow() -> None:
    assert thinned([8, 16, 24]) == [8, 16, 24]
    widths = thinned(range(8, 513, 8))
    assert widths[0] == 8 and widths[-1] == 512 and len(widths) == LEVELS
    assert all(1.4 < wide / narrow < 2.3 for narrow, wide in itertools.pairwise(widths))
    assert thinned([3, 400, 401, 402, 403, 404, 405, 406, 407]) == [3, 400, 407]  # where there are no others
    assert _measured(widths, 512) == [160, 8]  # the narrowest, and a third of the way up from there


def test_losses_of_a_kind_count_for_what_they_turned_out_to_be() -> None:
    true = {"widths": 0.3, "merge": 1.5, "drop": 4.0}
    draw = np.random.default_rng(0)
    plans = [{kind: float(draw.uniform(0, 0.5)) for kind in WEIGHED} for _ in range(12)]
    came = [sum(true[kind] * plan[kind] for kind in WEIGHED) * draw.uniform(0.9, 1.1) for plan in plans]
    found = learned(plans, came)
    assert found == {kind: pytest.approx(true[kind], rel=0.25) for kind in WEIGHED}


def test_nothing_is_learned_of_what_no_plan_has() -> None:
    assert learned([], []) == dict.fromkeys(WEIGHED, pytest.approx(1.0))
    found = learned([{"widths": 0.4, "merge": 0.0, "drop": 0.0}] * 3, [0.1] * 3)
    assert found["widths"] == pytest.approx(0.25, rel=0.05) and found["merge"] == found["drop"] == pytest.approx(1.0)


def test_one_plan_far_off_does_not_decide() -> None:
    """The first block dropped alone ruins a network, with a fitted block behind it it does not."""
    plans = [{"widths": 0.1, "merge": 0.0, "drop": d} for d in (0.1, 0.4, 0.8, 8.0)]
    found = learned(plans, [0.2, 0.5, 0.9, 0.15])
    assert 0.8 < found["drop"] < 1.2
    assert all(value > 0 for value in learned(plans, [0.0] * 4).values())  # a plan that loses nothing, or gains


@pytest.mark.parametrize("blocks", [{"2": "keep", "3": "drop"}, long({"2": "drop", "3": "remove"})], ids=str)
def test_what_costs_macs_outside_layers_is_counted(blocks: dict[str, Choice]) -> None:
    model, images = network(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    plans = written(model, ["keep", "remove", "drop"])
    cut, _ = carry_out_blocks(model, blocks, lambda _: images)
    structure = find_structure(cut, images)
    assert any(layer.kind == "rest" for layer in structure.layers)
    for part in (1.0, 0.8):
        found = plans.best(part * total_cost(structure), near=blocks, changes=0)
        assert found is not None and found.cost <= part * total_cost(structure) * (1 + 1e-9)
        units = SlimPlan(widths=found.widths).units(structure, strict=False)
        assert found.cost == pytest.approx(sum(Meter(structure, macs).at(units)))


def test_a_centre_of_choices_that_there_are_not_is_one_change_off() -> None:
    plans = written(network(), ["keep", "drop"])
    asked: dict[str, Choice] = {"2": "remove", "3": "keep"}
    assert plans.best(1e12, near=asked, changes=0) is None
    found = plans.best(1e12, near=asked)
    assert found is not None and found.blocks["3"] == "keep"
    assert plans.best(1e12, other_than=[asked], near=found.blocks, changes=0) is not None  # it is another one already
    assert plans.best(1e12, near={"2": "remove", "3": "merge"}) is None
