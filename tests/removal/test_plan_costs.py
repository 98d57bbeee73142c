"""What the plan says of costs is what the network that is really built costs, fused layers and folded norms included."""

import itertools

import pytest
import torch
from marks import few, long
from removal_nets import Residual, basic, conv, conv_bn, images, prepared
from torch import nn

from rmprune import count_macs, models, plan_removal, remove_residuals
from rmprune.config import InspectConfig, NetworkConfig, RemovalConfig
from rmprune.measure import count_params
from rmprune.pipelines.convert import run_inspect


def inverted(width: int, middle: int, stride: int = 1, out: int = 0) -> nn.Module:
    layers = nn.Sequential(
        *conv_bn(width, middle, 1),
        nn.ReLU6(),
        *conv_bn(middle, middle, 3, stride, middle),
        nn.ReLU6(),
        *conv_bn(middle, out or width, 1),
    )
    return layers if out else Residual(layers)


def twice() -> nn.Module:
    block = basic(6, lambda: nn.PReLU(6))
    return prepared(*conv_bn(3, 6), nn.ReLU(), block, block, nn.PReLU(6))


NETS = {
    "basic": lambda: prepared(*conv_bn(3, 6), nn.ReLU(), basic(6), basic(6)),
    "inverted": lambda: prepared(
        *conv_bn(3, 4), nn.ReLU6(), inverted(4, 8), inverted(4, 8), inverted(4, 8, 2, 6), inverted(6, 9)
    ),
    "projections and pools": lambda: prepared(
        conv(3, 4),
        nn.ReLU(),
        Residual(nn.Sequential(conv(4, 6, stride=2), nn.ReLU(), conv(6, 6)), conv_bn(4, 6, 1, 2), nn.PReLU(6)),
        Residual(nn.Sequential(conv(6, 6), nn.PReLU(6), conv(6, 6)), conv(6, 6, 1, groups=6, bias=False)),
        Residual(nn.Sequential(conv(6, 6, 3, 2), nn.ReLU(), conv(6, 6)), nn.AvgPool2d(1, 2)),
    ),
    "linear inside": lambda: prepared(
        conv(3, 4),
        nn.ReLU(),
        Residual(nn.Sequential(conv(4, 4), nn.ReLU()), Residual(nn.Sequential(conv(4, 5, 1), conv(5, 4, 1)))),
        conv(4, 3, 1),
        conv(3, 5),
    ),
    "one stays": lambda: prepared(
        *conv_bn(3, 6), nn.ReLU(), basic(6), basic(6, nn.Tanh), nn.Flatten(), nn.Linear(6 * 64, 3)
    ),
    "norms first": lambda: prepared(
        conv(3, 4),
        Residual(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), *conv_bn(4, 6), nn.ReLU(), conv(6, 4))),
        nn.BatchNorm2d(4),
    ),
    "one block twice": twice,
    "mobilenet_v2": lambda: models.create("mobilenet_v2_digits", num_classes=4).double().eval(),
}


DEEP = ("mobilenet_v2", "cheaper", True)  # in all other ways it is as "inverted", ten times over
SMALL = itertools.product([name for name in NETS if name not in DEEP], ("never", "cheaper", "always"), (True, False))


@pytest.mark.parametrize(
    ("name", "fuse", "batch_norm"), [long(*DEEP), *(long(*own) if own[1] == "always" else own for own in SMALL)]
)
def test_the_plan_costs_what_is_built(name: str, fuse: str, batch_norm: bool) -> None:
    model, x = NETS[name](), images()
    plan = plan_removal(model, x, fuse=fuse, batch_norm=batch_norm)
    removal = remove_residuals(model, x, fuse=fuse, batch_norm=batch_norm)
    assert count_macs(model, x) + plan.macs_change == count_macs(removal.model, x)
    assert count_params(model) + plan.params_change == count_params(removal.model)
    assert plan == removal.blocks
    changes = [sum(report.macs_after - report.macs_before for report in plan), plan.macs_change]
    if fuse == "never":  # nothing outside of blocks changes
        assert changes[0] == changes[1]


def test_fusing_and_folding_show_in_the_blocks() -> None:
    """A 1x1 after a 1x1: one product of both, counted with the second; and a folded norm has half the parameters of a norm."""
    model, x = prepared(*conv_bn(3, 4), nn.ReLU6(), inverted(4, 8), inverted(4, 8)), images()

    def after(fuse: str, batch_norm: bool) -> list[tuple[int, int]]:
        plan = plan_removal(model, x, fuse=fuse, batch_norm=batch_norm)
        return [(report.macs_after, report.params_after) for report in plan]

    first, second = after("never", True)
    fused = after("always", True)
    project, expand, product = (12 * 4, 4 * 12, 12 * 12)  # with 4 copies beside 8 channels
    assert fused[0] == (first[0] - project * 64, first[1] - project - 2 * 4)
    assert fused[1] == (second[0] + (product - expand) * 64, second[1] + product - expand)
    assert after("never", False) == [(first[0], first[1] - 12 - 12 - 4), (second[0], second[1] - 12 - 12 - 4)]


def test_a_block_that_stays_costs_what_it_did() -> None:
    model, x = NETS["one stays"](), images()
    kept = next(block for block in plan_removal(model, x, fuse="never") if not block.removable)
    assert kept.macs_before == kept.macs_after == 2 * 6 * 6 * 9 * 64
    assert kept.params_before == kept.params_after == 2 * (6 * 6 * 9 + 2 * 6)


def test_a_depthwise_shortcut_counts() -> None:
    model, x = NETS["projections and pools"](), images()
    second = plan_removal(model, x, fuse="never")[1]
    assert second.macs_before == (2 * 6 * 6 * 9 + 6) * 16 and second.params_before == 2 * (6 * 6 * 9 + 6) + 6 + 6


@pytest.mark.parametrize("fuse", few(["never", "always"], "always"))
def test_inspect_prints_the_total_of_what_would_be_built(fuse: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = InspectConfig(NetworkConfig("mobilenet_v2_digits", num_classes=4), RemovalConfig(fuse=fuse))
    blocks = run_inspect(config)
    assert len(blocks) > 3
    torch.manual_seed(0)
    model = models.create("mobilenet_v2_digits", num_classes=4).eval()
    x = torch.randn(2, 3, 8, 8)
    built = remove_residuals(model, x, fuse=fuse).model
    expected = f"{count_macs(model, x) / 1e6:,.1f} → {count_macs(built, x) / 1e6:,.1f} MMACs"
    assert expected in " ".join(capsys.readouterr().out.split())
