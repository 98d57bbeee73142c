"""CIFAR ResNets against the paper's figures; torchvision's with free width against torchvision's own."""

import pytest
import torch
import torchvision
from torch import fx, nn
from torchvision.models.resnet import BasicBlock

from rmprune.errors import ConfigError
from rmprune.models.families import create
from rmprune.models.resnet import SizedResNet


@pytest.mark.parametrize(("name", "millions"), [("resnet20", 0.27), ("resnet56", 0.85), ("resnet110", 1.7)])
def test_parameters_are_those_of_the_paper(name: str, millions: float):
    model = create(name, num_classes=10)
    params = sum(p.numel() for p in model.parameters())
    projections = sum(p.numel() for n, p in model.named_parameters() if "downsample" in n)  # the paper has option A
    assert (params - projections) / 1e6 == pytest.approx(millions, abs=0.03)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == int(name.removeprefix("resnet")) - 1


def test_names_width_and_shapes():
    model = create("resnet14", num_classes=7, in_channels=1, width=4)
    names = dict(model.named_modules())
    for name in ("conv1", "bn1", "layer1.0.conv1", "layer2.0.downsample.0", "layer2.0.downsample.1", "fc"):
        assert name in names
    assert "layer1.0.downsample" not in names and "layer2.1.downsample" not in names
    assert names["layer3.1.conv2"].out_channels == 16 and names["fc"].in_features == 16
    for size in (8, 28, 32):
        assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
    fx.symbolic_trace(model)


@pytest.mark.parametrize("name", ["resnet21", "resnet2", "resnet0"])
def test_other_depths_are_refused(name: str):
    with pytest.raises(ConfigError, match="6n"):
        create(name)


def test_torchvisions_resnet_of_its_own_width_computes_the_same():
    sized = SizedResNet(BasicBlock, (2, 2, 2, 2), width=64, num_classes=10).double().eval()
    theirs = torchvision.models.resnet18(num_classes=10).double().eval()
    theirs.load_state_dict(sized.state_dict())
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    assert torch.equal(sized(x), theirs(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_half_width_and_small_images(name: str):
    model = create(name, num_classes=10, in_channels=1, width=8, small_images=True)
    x = torch.randn(2, 1, 28, 28)
    assert model(x).shape == (2, 10)
    assert model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x))))).shape[-2:] == (28, 28)
    assert [model.get_submodule(f"layer{i}.0.bn1").num_features for i in (1, 2, 3, 4)] == [8, 16, 32, 64]
    with pytest.raises(ConfigError, match="width"):
        create(name, width=0)


def test_large_stem_with_other_input_channels():
    model = create("resnet18", num_classes=3, in_channels=5, width=4)
    assert model.conv1.kernel_size == (7, 7) and model(torch.randn(2, 5, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(("name", "blocks"), [("resnet10", 1), ("resnet66", 8)])
def test_depths_between_torchvisions_have_even_stages(name: str, blocks: int):
    with torch.device("meta"):
        model = create(name, num_classes=10, width=8)
    assert [len(model.get_submodule(f"layer{stage}")) for stage in (1, 2, 3, 4)] == [blocks] * 4
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
    assert len(layers) == int(name.removeprefix("resnet"))
    assert isinstance(model.layer1[0], BasicBlock)
    assert model.fc.in_features == 64


@pytest.mark.parametrize(("stride", "sizes"), [(1, [28, 28, 14, 7, 4]), (2, [14, 14, 7, 4, 2])])
def test_stem_stride(stride: int, sizes: list[int]):
    model = create("resnet10", num_classes=10, in_channels=1, width=4, small_images=True, stem_stride=stride)
    x = model.maxpool(model.relu(model.bn1(model.conv1(torch.randn(2, 1, 28, 28)))))
    found = [x.shape[-1]]
    for stage in (1, 2, 3, 4):
        x = model.get_submodule(f"layer{stage}")(x)
        found.append(x.shape[-1])
    assert found == sizes and model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
