"""RepVGG and its reserve-ratio form: the block's equation, the plain form, and timm's RepVGG weight by weight."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from repvgg_deployed import deploy
from torch import Tensor, nn

from rmprune.errors import ConfigError
from rmprune.measure.cost import count_macs
from rmprune.models.repvgg import RepVGG, RepVGGBlock, SqueezeExcitation, repvgg


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


def repvggs_kernel(block: RepVGGBlock) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Kernel and bias of RepVGG's block after Ding et al. 2021, section 3.3, one number at a time."""
    three, one = block.conv3.weight.detach().numpy(), block.conv1.weight.detach().numpy()
    norms = [block.bn3, block.bn1] + ([block.bn0] if block.bn0 is not None else [])
    kernel, bias = np.zeros_like(three), np.zeros(len(three))
    for o in range(len(three)):
        gains = [(bn.weight[o] / (bn.running_var[o] + bn.eps) ** 0.5).item() for bn in norms]
        bias[o] = sum(
            bn.bias[o].item() - bn.running_mean[o].item() * gain for bn, gain in zip(norms, gains, strict=True)
        )
        for i in range(three.shape[1]):
            for y in range(3):
                for x in range(3):
                    kernel[o, i, y, x] = three[o, i, y, x] * gains[0]
            kernel[o, i, 1, 1] += one[o, i, 0, 0] * gains[1]
        if len(gains) == 3:
            kernel[o, o, 1, 1] += gains[2]
    return kernel, bias


def test_without_reserve_every_deployed_weight_is_repvggs() -> None:
    model = randomise(repvgg(depth=13, num_classes=5, width=4, small_images=True, reserve_ratio=0))
    convolutions = [m for m in deploy(model) if isinstance(m, nn.Conv2d)]
    blocks = [m for m in model.modules() if isinstance(m, RepVGGBlock)]
    assert sum(block.bn0 is not None for block in blocks) == 9  # all but the first of the stem and of three stages
    for convolution, block in zip(convolutions, blocks, strict=True):
        kernel, bias = repvggs_kernel(block)
        np.testing.assert_allclose(convolution.weight.detach().numpy(), kernel, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(convolution.bias.detach().numpy(), bias, rtol=1e-12, atol=1e-12)


TIMMS_NAMES = {
    "conv_kxk.conv": "conv3",
    "conv_kxk.bn": "bn3",
    "conv_1x1.conv": "conv1",
    "conv_1x1.bn": "bn1",
    "identity": "bn0",
}


def timms_weights(theirs: nn.Module) -> dict[str, Tensor]:
    """The state of a timm RepVGG block under the names of ours."""
    state = {key.rpartition("."): value for key, value in theirs.state_dict().items()}
    return {f"{TIMMS_NAMES[layer]}.{name}": value for (layer, _, name), value in state.items()}


@pytest.mark.parametrize("stem_strides", [(1, 1), (2, 2), (2, 1)])
def test_without_reserve_the_network_is_timms_repvgg(stem_strides: tuple[int, int]) -> None:
    byobnet = pytest.importorskip("timm.models.byobnet")
    stages = [
        byobnet.ByoBlockCfg(type="rep", d=3, c=8 * 2**stage, s=stem_strides[1] if stage == 0 else 2)
        for stage in range(4)
    ]
    theirs = byobnet.ByobNet(byobnet.ByoModelCfg(tuple(stages), stem_type="rep", stem_chs=8), num_classes=5)
    if stem_strides[0] == 1:  # timm's stems all have stride 2
        theirs.stem = byobnet.RepVggBlock(3, 8, stride=1)
    theirs = randomise(theirs)
    ours = repvgg(depth=13, num_classes=5, width=8, reserve_ratio=0, stem_strides=stem_strides).double().eval()
    blocks = [m for m in ours.modules() if isinstance(m, RepVGGBlock)]
    for block, other in zip(blocks, (m for m in theirs.modules() if type(m).__name__ == "RepVggBlock"), strict=True):
        block.load_state_dict(timms_weights(other))
    ours.fc.load_state_dict(theirs.head.fc.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(deploy(ours)(x), theirs(x), rtol=1e-10, atol=1e-10)


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


def test_the_gates_stay_and_leave_reserved_channels_alone() -> None:
    """A gate multiplies by a function of the map itself, which no convolution does: the one thing that cannot go."""
    model = randomise(
        repvgg(depth=13, num_classes=5, width=32, small_images=True, reserve_ratio=0.25, squeeze_excitation=True)
    )
    assert isinstance(model, RepVGG)
    gates = [m for m in deploy(model) if isinstance(m, SqueezeExcitation)]
    blocks = [m for m in model.modules() if isinstance(m, RepVGGBlock)]
    assert len(gates) == len(blocks) == 13
    assert {block.reserved for block in blocks} == {0, 8, 16, 32, 64}
    for gate, block in zip(gates, blocks, strict=True):
        x = torch.randn(2, block.channels, 4, 4, dtype=torch.float64)
        assert gate.reserved == 0 and torch.equal(gate(x)[:, : block.reserved], x[:, : block.reserved])
        torch.testing.assert_close(gate(x), block.se(x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(gate(x)[:, block.reserved :], x[:, block.reserved :], rtol=0.01)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, (16, 8, 8)),
        ({"small_images": True}, (32, 32, 32)),
        ({"small_images": True, "stem_strides": (2, 1)}, (16, 16, 16)),
        ({"stem_strides": (1, 2)}, (32, 16, 16)),
    ],
)
def test_stems(settings: dict, sizes: tuple[int, int, int]) -> None:
    model = repvgg(depth=13, width=4, reserve_ratio=0.5, **settings)
    first = model.stem[0](torch.zeros(1, 3, 32, 32))
    second = model.stem[1](first)
    assert tuple(x.shape[-1] for x in (first, second, model.stages[0](second))) == sizes


def test_a_repvgg_block_follows_every_block_that_reserves() -> None:
    model = repvgg(depth=21, width=8, reserve_ratio=(0, 0.25, 0.5, 1))
    reserved = [m.reserved for m in model.modules() if isinstance(m, RepVGGBlock)]
    assert reserved == [0, 0, 0, 0, 0, 0, 0, 4, 0, 4, 0, 0, 16, 0, 16, 0, 0, 64, 0, 64, 0]


def test_training_cost_falls_with_the_ratio() -> None:
    params = [sum(p.numel() for p in repvgg(depth=21, width=8, reserve_ratio=r).parameters()) for r in (0, 0.5, 0.75)]
    assert params[0] > params[1] > params[2]


@pytest.mark.parametrize(
    ("depth", "ratio", "trained", "deployed"),
    [(21, 0, 2.4, 2.1), (21, 0.25, 2.1, 2.1), (37, 0.25, 3.9, 4.0)],
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


def test_refuses_a_block_that_cannot_reserve() -> None:
    with pytest.raises(ConfigError):
        RepVGGBlock(4, 8, reserved=2)
