"""RMNeXt: depths, group widths, shapes and the block's equation."""

import pytest
import torch
from torch import nn

from rmprune.errors import ConfigError
from rmprune.models.rmnext import NAMES, GroupedBottleneck, rmnext


@pytest.mark.parametrize("name", NAMES)
def test_published_forms(name: str) -> None:
    depth, expansion, group_width = (int(part) for part in name.removeprefix("rmnext").replace("x", "_").split("_"))
    with torch.device("meta"):
        model = rmnext(name)
    bottlenecks = [m for m in model.modules() if isinstance(m, GroupedBottleneck)]
    assert len(model.stem) + 3 * len(bottlenecks) == depth
    first, last = bottlenecks[0].conv2, bottlenecks[-1].conv2
    assert first.in_channels == (expansion - 1) * 64
    assert first.in_channels // first.groups == group_width
    assert last.in_channels // last.groups == 8 * group_width


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_published_definition(name: str) -> None:
    """Counted from the definition (Meng et al. 2021, section 4.4; they publish no figures), biases and 1000 classes included."""
    depth, expansion, group_width = (int(part) for part in name.removeprefix("rmnext").replace("x", "_").split("_"))
    with torch.device("meta"):
        model = rmnext(name)
    before, count = 64, 2 * 2 * 64 * 2 + (3 + 64) * 64 * 10  # two RepVGG blocks: 3x3 and 1x1 with batch norms
    for stage, blocks in enumerate({41: (2, 3, 5, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]):
        after, group = 64 * 2**stage, group_width * 2**stage
        hidden = (expansion - 1) * after
        if stage:
            count += before * after + 2 * after  # the shortcut that changes the shape
        for _ in range(blocks):
            count += before * hidden + 9 * hidden * group + hidden * after + 2 * (2 * hidden + after)
            before = after
    assert sum(p.numel() for p in model.parameters()) == count + 513 * 1000


def test_small_images_and_width() -> None:
    model = rmnext("rmnext17x3_2", blocks=(1, 2, 1, 1), width=8, num_classes=5, small_images=True).eval()
    assert model.layers(model.stem(torch.zeros(1, 3, 16, 16))).shape == (1, 64, 2, 2)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


def test_a_fresh_block_is_its_shortcut() -> None:
    model = rmnext("rmnext17x3_2", blocks=(2, 1, 1, 1), width=8, small_images=True).eval()
    x = torch.rand(1, 8, 6, 6)
    assert torch.equal(model.layers[0][1](x), x)


def test_block_is_its_equation() -> None:
    torch.manual_seed(0)
    block = GroupedBottleneck(6, 4, stride=2, expansion=3, group_width=2).double().eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    out = block.bn1(block.conv1(x)).relu()
    halves = [
        torch.nn.functional.conv2d(out[:, g : g + 2], block.conv2.weight[g : g + 2], stride=2, padding=1)
        for g in range(0, 8, 2)
    ]
    out = block.bn3(block.conv3(block.bn2(torch.cat(halves, 1)).relu()))
    torch.testing.assert_close(block(x), (out + block.downsample(x)).relu(), rtol=1e-12, atol=1e-12)


def test_is_deterministic_given_the_seed_and_traceable() -> None:
    settings = {"name": "rmnext14x3_2", "blocks": (1, 1, 1, 1), "width": 8}
    torch.manual_seed(3)
    first = rmnext(**settings)
    torch.manual_seed(3)
    second = rmnext(**settings)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.fx.symbolic_trace(first)


@pytest.mark.parametrize(
    "bad", [{"name": "rmnext51x5_32"}, {"name": "rmnext50x1_8"}, {"name": "rmnext50x5_7"}, {"name": "x"}]
)
def test_refuses_impossible_settings(bad: dict) -> None:
    with pytest.raises(ConfigError):
        rmnext(**bad)
