"""MobileNetV2 for any image size, with width multiplier and free width at training time (RM.md section 8).

Layout and names are torchvision's. Not for removal or fusing: these are the networks before RM, in stock layers.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from rmprune.errors import ConfigError

Stages = Sequence[tuple[int, int, int]]
NAMES = ("mobilenet_v2", "mobilenet_v2_small", "mobilenet_v2_digits")
IMAGENET_STAGES: Stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""Expansion, channels, blocks of every stage (MobileNetV2, table 2)."""
DIGITS_STAGES: Stages = ((1, 16, 1), (4, 24, 2), (4, 32, 3), (4, 64, 2))
IMAGENET_STRIDES: Sequence[int] = (2, 1, 2, 2, 2, 1, 2, 1)
"""Stride of the stem, then of every stage's first block."""
SMALL_STRIDES: Sequence[int] = (1, 1, 1, 2, 2, 1, 2, 1)
"""For images of 28 to 32 pixels: they leave a 4x4 map."""
DIGITS_STRIDES: Sequence[int] = (1, 1, 1, 2, 2)
"""For images of 8 pixels: they leave a 2x2 map."""


def round_channels(channels: float) -> int:
    """The multiple of 8 nearest to `channels`, never less than 90 % of it (as in the published MobileNets)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def channel_selection(in_channels: int, out_channels: int, kept: int) -> nn.Conv2d:
    """A frozen 1x1 convolution that passes the first `kept` channels and gives zero for the others.

    Depthwise where the widths agree. A stock layer, so that everything which reads a shortcut convolution
    (torch.fx, ONNX, RM) reads this one too.
    """
    groups = in_channels if in_channels == out_channels else 1
    selection = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
    nn.init.dirac_(selection.weight, groups=groups)
    nn.init.zeros_(selection.weight[kept:])
    return selection.requires_grad_(False)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; the input is added where stride and channels allow.

    The input has `in_free * in_channels` channels, the output `free * out_channels`; only the first `out_channels`
    take part in the addition.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, expansion: int, in_free: int = 1, free: int = 1
    ) -> None:
        super().__init__()
        width, hidden, out_width = in_channels * in_free, in_channels * expansion, out_channels * free
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(Conv2dNormActivation(width, hidden, kernel_size=1, activation_layer=nn.ReLU6))
        else:
            hidden = width
        layers += [
            Conv2dNormActivation(hidden, hidden, stride=stride, groups=hidden, activation_layer=nn.ReLU6),
            nn.Conv2d(hidden, out_width, 1, bias=False),
            nn.BatchNorm2d(out_width),
        ]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and in_channels == out_channels
        widened = self.use_res_connect and (free > 1 or in_free > 1)
        self.select = channel_selection(width, out_width, out_channels) if widened else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.use_res_connect:
            return self.conv(x)
        return (x if self.select is None else self.select(x)) + self.conv(x)


class MobileNetV2(nn.Module):
    """Input (N, in_channels, H, W), output (N, num_classes).

    With free=1 and ImageNet's stages, torchvision's network, name by name.
    """

    def __init__(
        self, num_classes: int, in_channels: int, *, width: float, free: int, stages: Stages, strides: Sequence[int],
        last_channels: int, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        channels, in_free = round_channels(32 * width), 1
        layers: list[nn.Module] = [
            Conv2dNormActivation(in_channels, channels, stride=strides[0], activation_layer=nn.ReLU6)
        ]
        for (expansion, stage_channels, blocks), stage_stride in zip(stages, strides[1:], strict=True):
            out_channels = round_channels(stage_channels * width)
            for stride in (stage_stride, *[1] * (blocks - 1)):
                layers.append(
                    InvertedResidual(
                        channels, out_channels, stride=stride, expansion=expansion, in_free=in_free, free=free
                    )
                )
                channels, in_free = out_channels, free
        last = round_channels(last_channels * max(1.0, width))
        layers.append(Conv2dNormActivation(channels * in_free, last, kernel_size=1, activation_layer=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))


def _initialise(model: nn.Module) -> None:
    """He's normal initialisation (fan out), as torchvision's; frozen selections stay what they are."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


def mobilenet_v2(
    name: str = "mobilenet_v2",
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    free: int = 1,
    small_images: bool = False,
    stages: Stages | None = None,
    strides: Sequence[int] | None = None,
    last_channels: int | None = None,
    dropout: float = 0.2,
) -> MobileNetV2:
    """MobileNetV2 (Sandler et al. 2018) by name, one of `NAMES`: for ImageNet, for 28 to 32 pixels, for 8 pixels.

    width: multiplier of every width, rounded to multiples of 8; free: factor of the linear bottlenecks' width (RM.md
    section 8), which costs nothing once project and expand are fused; stages: (expansion, channels, blocks) each;
    strides: of the stem and of each stage's first block (default: ImageNet's, or with small_images those that leave
    4x4 of 28 to 32 pixels). Raises ConfigError on settings that make no network.
    """
    if name not in NAMES:
        raise ConfigError(f"{name} is none of {', '.join(NAMES)}")
    digits, small = name == "mobilenet_v2_digits", small_images or name == "mobilenet_v2_small"
    if stages is None:
        stages = DIGITS_STAGES if digits else IMAGENET_STAGES
    if strides is None:
        strides = DIGITS_STRIDES if digits else SMALL_STRIDES if small else IMAGENET_STRIDES
    if last_channels is None:
        last_channels = 256 if digits else 1280
    if width <= 0 or free < 1:
        raise ConfigError(f"mobilenet_v2: width {width} must be above 0 and free {free} at least 1")
    if len(strides) != len(stages) + 1:
        raise ConfigError(
            f"mobilenet_v2: {len(stages)} stages need {len(stages) + 1} strides (the stem's first), got {len(strides)}"
        )
    return MobileNetV2(
        num_classes, in_channels, width=width, free=free, stages=stages, strides=strides, last_channels=last_channels,
        dropout=dropout,
    )  # fmt: skip
