"""The plan: what would happen and what it costs, without building it."""

import pytest
from removal_nets import (
    Residual,
    conv_bn,
    images,
    prepared,
    small_resnet,
)
from torch import nn

from rmprune.removal import plan_removal, remove, remove_residuals


def test_plan_builds_nothing_and_agrees_with_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_resnet()
    reports = remove_residuals(model, images()).blocks
    monkeypatch.setattr(remove, "materialise", lambda *args: pytest.fail("the plan built weights"))
    plan = plan_removal(model, images())
    assert plan == reports
    first, second = plan
    assert (first.form, first.shortcut, first.reserved) == ("free", "identity", 6)
    assert first.macs_before == 2 * 6 * 6 * 9 * 64 and first.macs_after == 2 * 12 * 6 * 9 * 64
    assert second.shortcut == "conv 1x1/2" and second.reserved == 6
    assert (
        second.macs_before == (6 * 8 * 9 + 8 * 8 * 9 + 6 * 8) * 16
        and second.macs_after == (6 * 14 * 9 + 14 * 8 * 9) * 16
    )
    assert second.params_after == 6 * 14 * 9 + 14 * 8 * 9 + 2 * (14 + 8)


def test_the_plan_shows_a_bottleneck_its_price() -> None:
    """RM.md 5: 256-64-64-256 gets 320 channels through its 3x3, 25 times the MACs of that layer."""
    branch = nn.Sequential(*conv_bn(256, 64, 1), nn.ReLU(), *conv_bn(64, 64), nn.ReLU(), *conv_bn(64, 256, 1))
    (report,) = plan_removal(prepared(nn.ReLU(), Residual(branch)), images(256, 4, 1))
    assert report.reserved == 256
    assert report.macs_after - 2 * 256 * 320 * 16 == 25 * (64 * 64 * 9 * 16)
