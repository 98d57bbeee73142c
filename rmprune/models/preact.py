"""Pre-activation ResNets (He et al. 2016, "Identity mappings in deep residual networks") in stock layers.

Not for removal: a block is relu(bn(x)) first, and the addition has no activation behind it.
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from rmprune.errors import ConfigError
from rmprune.models.resnet import initialise_convolutions


class PreActBlock(nn.Module):
    """`conv2(relu(bn2(conv1(a)))) + shortcut` with a = relu(bn1(x)).

    The shortcut is x, or a 1x1 convolution of a where the shape changes.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class PreActResNet(nn.Module):
    """Input (N, in_channels, H, W), output (N, num_classes)."""

    def __init__(
        self, num_classes: int, in_channels: int, *, blocks: Sequence[int], width: int, small_images: bool
    ) -> None:
        super().__init__()
        if small_images:
            self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        stages = []
        for stage, count in enumerate(blocks):
            strides = (1 if stage == 0 else 2, *[1] * (count - 1))
            out_channels = width * 2**stage
            layers = []
            for stride in strides:
                layers.append(PreActBlock(channels, out_channels, stride))
                channels = out_channels
            stages.append(nn.Sequential(*layers))
        self.layers = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.layers(self.maxpool(self.conv1(x)))))
        return self.fc(self.flatten(self.avgpool(x)))


PATTERN = r"preact_resnet(\d+)"
NAMES = tuple(f"preact_resnet{depth}" for depth in (18, 34, 20, 32, 44, 56, 110))
IMAGENET_BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def preact_resnet(
    name: str = "preact_resnet18",
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: int | None = None,
    small_images: bool | None = None,
) -> PreActResNet:
    """PreActResNet by name, preact_resnet{depth}: 10, 18 and 34 have ImageNet's four stages (64 channels on),
    6n+2 CIFAR's three (16 on).

    small_images: a 3x3 stem of stride 1 without max-pool instead of 7x7, stride 2 and max-pool (default: CIFAR's forms
    have it). width: channels of the first stage. Raises ConfigError for any other depth.
    """
    parts = re.fullmatch(PATTERN, name)
    depth = int(parts.group(1)) if parts else 0
    if depth in IMAGENET_BLOCKS:
        blocks: Sequence[int] = IMAGENET_BLOCKS[depth]
        default_width, default_small = 64, False
    elif depth >= 8 and depth % 6 == 2:
        blocks = ((depth - 2) // 6,) * 3
        default_width, default_small = 16, True
    else:
        raise ConfigError(
            f"{name}: preact_resnet{{depth}} has the depths {sorted(IMAGENET_BLOCKS)} and 6n+2 (8, 14, 20, ...)"
        )
    width = default_width if width is None else width
    small_images = default_small if small_images is None else small_images
    return PreActResNet(num_classes, in_channels, blocks=blocks, width=width, small_images=small_images)
