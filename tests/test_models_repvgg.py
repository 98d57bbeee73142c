"""RepVGG and its reserve-ratio form: the block's equation, the plain form, and timm's RepVGG block weight by weight."""

import pytest
import torch
from torch import Tensor, nn

from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.measure.cost import count_macs
from rmprune.models.repvgg import RepVGGBlock, SqueezeExcitation, deploy, repvgg


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and batch-norm statistics, float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 2, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
            nn.init.normal_(module.running_mean, generator=generator)
            nn.init.uniform_(module.running_var, 0.3, 2, generator=generator)
    return model.double().eval()


def normalised(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    shape = (1, -1, 1, 1)
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return (x - bn.running_mean.view(shape)) * scale.view(shape) + bn.bias.view(shape)


@pytest.mark.parametrize("reserved", [0, 3, 6])
def test_block_is_its_equation(reserved: int) -> None:
    block = randomise(RepVGGBlock(8, 8, reserved=reserved))
    x = torch.rand(2, 8, 5, 5, dtype=torch.float64)
    three = normalised(torch.nn.functional.conv2d(x, block.conv3.weight, padding=1), block.bn3)
    one = normalised(torch.einsum("oi,nihw->nohw", block.conv1.weight[:, :, 0, 0], x), block.bn1)
    expected = torch.cat([x[:, :reserved], three + one + normalised(x[:, reserved:], block.bn0)], 1).clamp_min(0)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_block_without_reserve_is_timms_repvgg_block() -> None:
    byobnet = pytest.importorskip("timm.models.byobnet")
    theirs = randomise(byobnet.RepVggBlock(6, 6))
    ours = RepVGGBlock(6, 6).double().eval()
    state = theirs.state_dict()
    names = {
        "conv_kxk.conv": "conv3",
        "conv_kxk.bn": "bn3",
        "conv_1x1.conv": "conv1",
        "conv_1x1.bn": "bn1",
        "identity": "bn0",
    }
    renamed = {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in state.items()}
    ours.load_state_dict(renamed)
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 0.75, 1, (0, 0.25, 0.5, 1)])
@pytest.mark.parametrize("gated", [False, True])
def test_deployed_equals_trained(ratio: float | tuple[float, ...], gated: bool) -> None:
    model = randomise(
        repvgg(depth=13, num_classes=5, width=4, small_images=True, reserve_ratio=ratio, squeeze_excitation=gated)
    )
    x = 3 * torch.randn(2, 3, 12, 12, dtype=torch.float64)
    plain, expected = deploy(model), model(x)
    assert (plain(x) - expected).abs().max() <= 1e-10 * expected.abs().max()
    kinds = [type(m) for m in plain if not isinstance(m, SqueezeExcitation)]
    assert kinds == [nn.Conv2d, nn.ReLU] * 13 + [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]


def test_deployed_shapes_do_not_depend_on_the_ratio() -> None:
    shapes = [
        [p.shape for p in deploy(repvgg(depth=21, num_classes=5, width=8, reserve_ratio=ratio)).parameters()]
        for ratio in (0, 0.25, 0.75, 1)
    ]
    assert all(s == shapes[0] for s in shapes)


def test_training_cost_falls_with_the_ratio() -> None:
    params = [sum(p.numel() for p in repvgg(depth=21, width=8, reserve_ratio=r).parameters()) for r in (0, 0.5, 0.75)]
    assert params[0] > params[1] > params[2]


@pytest.mark.parametrize(
    ("depth", "ratio", "trained", "deployed"),
    [(21, 0, 2.4, 2.1), (21, 0.25, 2.1, 2.1), (37, 0.25, 3.9, 4.0), (69, 0.5, 6.5, 7.7), (133, 0.75, 10.6, 15.1)],
)
def test_costs_are_the_papers(depth: int, ratio: float, trained: float, deployed: float) -> None:
    with torch.device("meta"):
        model = repvgg(depth=depth, reserve_ratio=ratio)
    x = torch.zeros(1, 3, 224, 224)
    assert count_macs(model, x) / 1e9 == pytest.approx(trained, abs=0.07)
    assert count_macs(deploy(model), x) / 1e9 == pytest.approx(deployed, abs=0.07)


def test_deploy_leaves_the_model_alone() -> None:
    model = repvgg(depth=13, num_classes=5, width=4, reserve_ratio=0.5).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = deploy(model)
    nn.init.zeros_(plain.fc.weight)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_deployed_names_tell_the_block() -> None:
    assert "stages_1_0_conv.weight" in deploy(repvgg(depth=13, width=4)).state_dict()


@pytest.mark.parametrize("depth", [13, 21, 37])
def test_depth_counts_the_3x3_layers(depth: int) -> None:
    model = repvgg(f"repvgg{depth}", width=4, reserve_ratio=0.5)
    assert sum(isinstance(m, RepVGGBlock) for m in model.modules()) == depth
    assert model.stem(torch.zeros(1, 3, 32, 32)).shape[-1] == 8


def test_is_deterministic_given_the_seed_and_traceable() -> None:
    torch.manual_seed(3)
    first = repvgg(depth=13, width=8, reserve_ratio=0.5)
    torch.manual_seed(3)
    second = repvgg(depth=13, width=8, reserve_ratio=0.5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.fx.symbolic_trace(first)


@pytest.mark.parametrize(
    "bad",
    [
        {"depth": 20},
        {"depth": 5},
        {"name": "repvgg37", "depth": 21},
        {"reserve_ratio": 1.5},
        {"reserve_ratio": (0, 0.5)},
    ],
)
def test_refuses_impossible_settings(bad: dict) -> None:
    with pytest.raises(ConfigError):
        repvgg(**bad)


def test_refuses_what_it_cannot_deploy() -> None:
    with pytest.raises(ConfigError):
        RepVGGBlock(4, 8, reserved=2)
    with pytest.raises(UnsupportedModel):
        deploy(nn.Sequential(nn.Conv2d(3, 3, 1)))  # type: ignore[arg-type]
