"""Residual networks of basic blocks: the CIFAR ResNets (He et al. 2016, section 4.2), and torchvision's ResNets with a
free width and a stem for small images. Every other torchvision network comes from torchvision itself.
"""

import re

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from rmprune.config import require
from rmprune.errors import ConfigError

CIFAR_NAMES = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet1202")
_TORCHVISION_LAYERS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet66": (BasicBlock, (8, 8, 8, 8)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
TORCHVISION_NAMES = tuple(_TORCHVISION_LAYERS)


class CifarResNet(nn.Module):
    """Three stages of `blocks` basic blocks with width, 2 width and 4 width channels; depth 6 blocks + 2.

    Shortcuts that change the shape are 1x1 convolutions with batch norm (option B), all others are the identity.
    Input [N, in_channels, H, W] with H and W of about 8 to 64, output [N, num_classes].
    """

    def __init__(self, blocks: int, *, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or in_channels != channels:
        conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


def initialise_convolutions(model: nn.Module) -> None:
    """He initialisation by fan-out, as torchvision does it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def is_cifar_depth(name: str) -> bool:
    """Whether the name is a ResNet of ours: a depth of 6n+2 that torchvision does not have."""
    found = re.fullmatch(r"resnet([1-9]\d*)", name)
    depth = int(found[1]) if found else 0
    return depth >= 8 and depth % 6 == 2 and name not in TORCHVISION_NAMES


def cifar_resnet(name: str, *, num_classes: int, in_channels: int, width: int = 16) -> nn.Module:
    """`resnet20`, `resnet32`, ... `resnet{6n+2}` with `width` channels in the first stage. Raises ConfigError for other depths."""
    require(width >= 1, f"{name}: width is {width}; it must be at least 1")
    if not is_cifar_depth(name):
        raise ConfigError(f"{name}: CIFAR ResNets have depth 6n+2, such as {', '.join(CIFAR_NAMES)}")
    blocks = (int(name.removeprefix("resnet")) - 2) // 6
    return CifarResNet(blocks, num_classes=num_classes, in_channels=in_channels, width=width)


class SizedResNet(ResNet):
    """torchvision's ResNet with `width` instead of 64 channels in the first stage (then 2, 4 and 8 times as many)."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], layers: tuple[int, int, int, int], *, width: int, num_classes: int,
    ) -> None:  # fmt: skip
        super().__init__(block, list(layers), num_classes=num_classes)
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._make_layer(block, width, layers[0])
        self.layer2 = self._make_layer(block, 2 * width, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 4 * width, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 8 * width, layers[3], stride=2)
        self.fc = nn.Linear(8 * width * block.expansion, num_classes)
        initialise_convolutions(self)


def torchvision_resnet(
    name: str, *, num_classes: int, in_channels: int, width: int = 64, small_images: bool = False, stem_stride: int = 1
) -> nn.Module:
    """torchvision's `resnet18` ... `resnet152`, with `width` channels in the first stage.

    `resnet10` and `resnet66` are the same with 1 and 8 basic blocks in each stage. `small_images` puts a 3x3 convolution of
    stride `stem_stride` for the 7x7 of stride 2 and leaves out the max-pool, as is customary for inputs of up to 64 pixels.
    """
    require(width >= 1, f"{name}: width is {width}; it must be at least 1")
    block, layers = _TORCHVISION_LAYERS[name]
    if width == 64:
        model = ResNet(block, list(layers), num_classes=num_classes)
    else:
        model = SizedResNet(block, layers, width=width, num_classes=num_classes)
    if small_images:
        model.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, 1, bias=False)
        model.maxpool = nn.Identity()
    elif in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
    initialise_convolutions(nn.ModuleList([model.conv1]))
    return model
