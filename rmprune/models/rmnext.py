"""RMNeXt: residual networks of grouped bottlenecks made to be plain at deployment (Meng et al. 2021, section 4.4).

In a grouped bottleneck reserved channels join the 3x3 convolution as whole extra groups, so that reserving is cheap.
Not for removal: `rmprune.remove_residuals` makes the plain form.
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from rmprune.errors import ConfigError
from rmprune.models.repvgg import RepVGGBlock
from rmprune.models.resnet import initialise_convolutions

PATTERN = r"rmnext(\d+)x(\d+)_(\d+)"
NAMES = ("rmnext41x5_16", "rmnext50x5_32", "rmnext50x6_32", "rmnext101x6_16", "rmnext152x6_32")
"""ImageNet top-1 in the paper: 78.50, 79.08, 79.57, 80.07, 80.36."""
BLOCKS = {41: (2, 3, 5, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Bottlenecks of every stage by depth: 3 convolutions each, plus the stem's two."""


class GroupedBottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1, shortcut, ReLU; (N, C_in, H, W) to (N, C, H / stride, W / stride).

    The hidden width is (expansion - 1) * C, with the C reserved channels expansion * C at deployment.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int, expansion: int, group_width: int) -> None:
        super().__init__()
        hidden = (expansion - 1) * channels
        if group_width < 1 or hidden % group_width:
            raise ConfigError(f"rmnext: {hidden} hidden channels do not divide into groups of {group_width}")
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden // group_width, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.relu2 = nn.ReLU(inplace=True)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
            if stride != 1 or in_channels != channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + (x if self.downsample is None else self.downsample(x)))


class RMNeXt(nn.Module):
    """RepVGG blocks as the stem, four stages of grouped bottlenecks, pool, linear; group width doubles with width."""

    def __init__(
        self, num_classes: int, in_channels: int, *, blocks: Sequence[int], expansion: int, group_width: int,
        width: int, small_images: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        channels = min(64, width)
        stem = [RepVGGBlock(in_channels, channels, stride=1 if small_images else 2, identity=False)]
        if not small_images:
            stem.append(RepVGGBlock(channels, channels, stride=2, identity=False))
        self.stem = nn.Sequential(*stem)
        stages = []
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                layers.append(
                    GroupedBottleneck(
                        channels,
                        width * 2**stage,
                        stride=stride,
                        expansion=expansion,
                        group_width=group_width * 2**stage,
                    )
                )
                channels = width * 2**stage
            stages.append(nn.Sequential(*layers))
        self.layers = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise_convolutions(self)
        for module in self.modules():
            if isinstance(module, GroupedBottleneck):
                nn.init.zeros_(module.bn3.weight)  # every block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.layers(self.stem(x)))))


def rmnext(
    name: str = "rmnext50x5_32",
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: int = 64,
    blocks: Sequence[int] | None = None,
    small_images: bool = False,
) -> RMNeXt:
    """RMNeXt by name, rmnext{depth}x{expansion}_{group_width}; the paper's are in `NAMES`.

    Expansion: hidden over outer width at deployment; group width: channels of a group in the first stage (doubled by
    each stage). width: channels of the first stage; blocks: bottlenecks of every stage, instead of the depth's;
    small_images: a stem of one block of stride 1. Raises ConfigError.
    """
    parts = re.fullmatch(PATTERN, name)
    if parts is None:
        raise ConfigError(
            f"{name} is no RMNeXt; their names are rmnext{{depth}}x{{expansion}}_{{group width}}: {NAMES}"
        )
    depth, expansion, group_width = map(int, parts.groups())
    if blocks is None:
        if depth not in BLOCKS:
            raise ConfigError(f"{name}: depth {depth} is none of {sorted(BLOCKS)}; give blocks= for another")
        blocks = BLOCKS[depth]
    if expansion < 2:
        raise ConfigError(
            f"{name}: expansion {expansion} leaves no hidden channels beside the reserved ones; 2 or more"
        )
    return RMNeXt(
        num_classes, in_channels, blocks=blocks, expansion=expansion, group_width=group_width, width=width,
        small_images=small_images,
    )  # fmt: skip
