"""What the surrogate takes widths to lose, and what it learns from plans that were carried out."""

import itertools

import numpy as np
import pytest

from rmprune.pruning.proposals import LEVELS, WEIGHED, learned, thinned
from rmprune.pruning.surrogate import _curve, _measured


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
