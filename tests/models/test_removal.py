"""Our networks through RM: each becomes a plain chain of stock modules, equal within 1e-10 in float64."""

import operator
from typing import Any

import pytest
import torch
from marks import long
from removal_nets import has_addition
from repvgg_deployed import deploy
from torch import Tensor, fx, nn

from rmprune.models.families import create
from rmprune.models.repvgg import RepVGG, RepVGGBlock
from rmprune.models.rmnext import GroupedBottleneck
from rmprune.removal import remove_residuals

RMNEXT = {"blocks": (2, 1, 1, 1), "width": 8}
NETWORKS: list[tuple[str, dict[str, Any], int]] = [
    ("preact_resnet8", {"width": 4}, 12),
    ("rmnext17x3_2", RMNEXT | {"small_images": True}, 12),
    ("rmnext17x3_4", RMNEXT, 32),
    ("mobilenet_v2_digits", {"width": 0.25, "free": 1}, 8),
    ("mobilenet_v2_digits", {"width": 0.25, "free": 3}, 8),
]


def random_statistics(model: nn.Module) -> nn.Module:
    """Float64 and eval mode, gains that saturate, statistics that are not fresh."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1, 4)
            nn.init.normal_(module.bias, 1)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 3)
    return model.double().eval()


@pytest.mark.parametrize(("name", "settings", "size"), NETWORKS, ids=[f"{n} {s}" for n, s, _ in NETWORKS])
def test_becomes_a_plain_chain(name: str, settings: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    model = random_statistics(create(name, num_classes=5, in_channels=2, **settings))
    removal = remove_residuals(model, torch.randn(4, 2, size, size, dtype=torch.float64))
    assert not removal.kept
    assert isinstance(removal.model, nn.Sequential)
    stock = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}
    assert {type(layer) for layer in removal.model} <= stock
    for x in (torch.randn(2, 2, size, size), 20 * torch.randn(2, 2, size, size) - 10):
        expected = model(x.double())
        assert (removal.model(x.double()) - expected).abs().max() <= 1e-10 * expected.abs().max()


def kernels(model: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def error(plain: nn.Module, model: nn.Module, x: Tensor) -> float:
    """Largest difference relative to the largest output."""
    with torch.no_grad():
        expected = model(x)
        return float((plain(x) - expected).abs().max() / expected.abs().max())


RATIOS: list[float | tuple[float, ...]] = [0, 0.25, (0, 0.25, 0.5, 0.75), (0.75, 0.5, 0.5, 0)]


@pytest.mark.parametrize(("ratio", "depth"), [*((ratio, 13) for ratio in RATIOS), long(RATIOS[-1], 21)])
def test_removal_deploys_repvgg_as_deploy_does(depth: int, ratio: float | tuple[float, ...]) -> None:
    torch.manual_seed(0)
    model = random_statistics(
        create("repvgg", depth=depth, num_classes=5, width=4, small_images=True, reserve_ratio=ratio)
    )
    assert isinstance(model, RepVGG)
    removal = remove_residuals(model, torch.randn(2, 3, 10, 10, dtype=torch.float64), batch_norm=False)
    assert not removal.kept
    plain, expected = kernels(removal.model), kernels(deploy(model))
    assert [layer.weight.shape for layer in plain] == [layer.weight.shape for layer in expected]
    for ours, theirs in zip(plain, expected, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-10, atol=1e-12)
    x = 20 * torch.randn(2, 3, 9, 9, dtype=torch.float64) - 10
    assert error(removal.model, model, x) <= 1e-10


@pytest.mark.parametrize("ratio", [1, (0, 0.25, 0.5, 1)])
def test_blocks_that_reserve_everything_leave_no_layer_behind(ratio: float | tuple[float, ...]) -> None:
    """`deploy` writes them as Dirac kernels, in the shapes of RepVGG; removal needs none."""
    torch.manual_seed(0)
    model = random_statistics(create("repvgg13", num_classes=5, width=4, small_images=True, reserve_ratio=ratio))
    assert isinstance(model, RepVGG)
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    removal = remove_residuals(model, x, batch_norm=False)
    assert not removal.kept
    empty = sum(block.reserved == block.channels for block in model.modules() if isinstance(block, RepVGGBlock))
    assert len(kernels(removal.model)) == 13 - empty < len(kernels(deploy(model))) == 13
    for each in (x, 20 * x - 10):
        assert error(removal.model, model, each) <= 1e-10 and error(deploy(model), model, each) <= 1e-10


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_deployed_repvgg_has_the_shapes_of_plain_repvgg(ratio: float) -> None:
    """Written out layer by layer, so that `deploy` is not its own witness."""
    model = random_statistics(create("repvgg13", num_classes=5, width=8, small_images=True, reserve_ratio=ratio))
    plain = remove_residuals(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), batch_norm=False).model
    assert isinstance(plain, nn.Sequential)
    kinds = [nn.Conv2d, nn.ReLU] * 13 + [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert [type(layer) for layer in plain] == kinds
    widths = [8] * 4 + [16] * 3 + [32] * 3 + [64] * 3
    assert [layer.weight.shape for layer in kernels(plain)] == [
        (after, before, 3, 3) for before, after in zip([3, *widths[:-1]], widths, strict=True)
    ]
    assert [layer.stride[0] for layer in kernels(plain)] == [1] * 4 + [2, 1, 1] * 3
    assert all(layer.groups == 1 and layer.bias is not None for layer in kernels(plain))


@pytest.mark.long
def test_very_deep_repvgg_deploys_exactly() -> None:
    torch.manual_seed(0)
    model = random_statistics(create("repvgg", depth=37, num_classes=5, width=4, small_images=True, reserve_ratio=0.75))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    removal = remove_residuals(model, x, batch_norm=False)
    assert not removal.kept
    assert isinstance(model, RepVGG)
    assert [layer.weight.shape for layer in kernels(removal.model)] == [
        layer.weight.shape for layer in kernels(deploy(model))
    ]
    assert error(removal.model, model, 3 * x) <= 1e-10


def test_of_gated_repvgg_only_the_gates_stay() -> None:
    """A gate multiplies the map by a function of the map, which is not linear: it cannot go into a kernel. Every second block reserves."""
    torch.manual_seed(0)
    model = random_statistics(
        create("repvgg13", num_classes=5, width=16, small_images=True, reserve_ratio=0.5, squeeze_excitation=True)
    )
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    removal = remove_residuals(model, x, batch_norm=False)
    assert not removal.kept and not has_addition(removal.model)
    assert isinstance(removal.model, fx.GraphModule)
    products = sum(node.target in (operator.mul, torch.mul) for node in removal.model.graph.nodes)
    assert products == sum(isinstance(layer, nn.Sigmoid) for layer in removal.model.modules()) == 13
    sizes = [layer.kernel_size[0] for layer in kernels(removal.model)]
    assert sizes.count(3) == 13 and sizes.count(1) == 26  # a 3x3 kernel for each block, two 1x1 for each gate
    for each in (x, 20 * x - 10):
        assert error(removal.model, model, each) <= 1e-10


@pytest.mark.parametrize(("depth", "size"), [(18, 32), (20, 8)])
@pytest.mark.parametrize("ranges", ["provable", "calibrated"])
def test_preact_resnets_become_plain_in_stock_activations(depth: int, size: int, ranges: str) -> None:
    """Nothing bounds a pre-activation from below, so copies pass as sign pairs; bounds that were seen allow one copy."""
    torch.manual_seed(0)
    model = random_statistics(create(f"preact_resnet{depth}", num_classes=5, width=4))
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    removal = remove_residuals(model, x, ranges=ranges)
    assert not removal.kept and isinstance(removal.model, nn.Sequential)
    stock = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}
    assert {type(layer) for layer in removal.model} <= stock
    forms = {block.form for block in removal.blocks if block.shortcut == "identity"}
    assert forms == {"pair"} if ranges == "provable" else forms <= {"shift", "free+shift"}
    assert error(removal.model, model, x) <= 1e-10
    if ranges == "provable":
        assert error(removal.model, model, 20 * torch.randn_like(x) - 10) <= 1e-10


@pytest.mark.parametrize("name", ["rmnext17x3_2", "rmnext17x5_4"])
def test_copies_join_rmnexts_convolutions_as_whole_groups(name: str) -> None:
    torch.manual_seed(0)
    model = random_statistics(create(name, num_classes=5, **RMNEXT, small_images=True))
    removal = remove_residuals(model, torch.randn(2, 3, 12, 12, dtype=torch.float64), batch_norm=False)
    assert not removal.kept
    bottlenecks = [m for m in model.modules() if isinstance(m, GroupedBottleneck)]
    grouped = [layer for layer in kernels(removal.model) if layer.groups > 1]
    assert len(kernels(removal.model)) == 1 + 3 * len(bottlenecks)
    for convolution, block in zip(grouped, bottlenecks, strict=True):
        group_width = block.conv2.in_channels // block.conv2.groups
        assert convolution.in_channels == block.conv2.in_channels + block.conv1.in_channels
        assert convolution.in_channels // convolution.groups == group_width
