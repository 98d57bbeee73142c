"""RepVGG with a reserve ratio (RM.md section 7; Meng et al. 2021, section 4.3). `rmprune.remove_residuals` deploys it as plain layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rmprune.errors import ConfigError

PATTERN = r"repvgg(\d*)"
NAMES = ("repvgg", *(f"repvgg{depth}" for depth in (13, 21, 37, 69, 133)))


class SqueezeExcitation(nn.Module):
    """Channel gate, sigmoid(up(relu(down(mean(x))))), that leaves the first `reserved` channels alone."""

    def __init__(self, channels: int, squeezed: int, reserved: int = 0) -> None:
        super().__init__()
        self.reserved = reserved
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down = nn.Conv2d(channels, squeezed, 1)
        self.relu = nn.ReLU(inplace=True)
        self.up = nn.Conv2d(squeezed, channels - reserved, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.sigmoid(self.up(self.relu(self.down(self.pool(x)))))
        if not self.reserved:
            return x * gate
        return torch.cat([x[:, : self.reserved], x[:, self.reserved :] * gate], 1)


class RepVGGBlock(nn.Module):
    """relu(concat(x[:R], bn3(conv3(x)) + bn1(conv1(x)) + bn0(x[R:]))) with R = `reserved`.

    (N, C_in, H, W) to (N, C_out, H / stride, W / stride). The third branch exists where stride and channels allow (and
    `identity` asks for it); reserving needs that too, and an input that is not negative, which the ReLU of the block
    before gives. R = 0 is RepVGG's block.
    """

    def __init__(
        self, in_channels: int, channels: int, *, stride: int = 1, reserved: int = 0, identity: bool = True,
        squeeze_excitation: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        same = stride == 1 and in_channels == channels
        if reserved and not same:
            raise ConfigError(f"a RepVGG block {in_channels} to {channels}, stride {stride}, cannot reserve channels")
        self.reserved = reserved
        computed = channels - reserved
        if computed:
            self.conv3 = nn.Conv2d(in_channels, computed, 3, stride, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(computed)
            self.conv1 = nn.Conv2d(in_channels, computed, 1, stride, bias=False)
            self.bn1 = nn.BatchNorm2d(computed)
        self.bn0 = nn.BatchNorm2d(computed) if same and identity and computed else None
        has_gate = squeeze_excitation and computed
        self.se = SqueezeExcitation(channels, max(1, channels // 16), reserved) if has_gate else None
        self.relu = nn.ReLU(inplace=True)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if self.reserved == self.channels:  # nothing is computed here; the next block does
            return self.relu(x)
        out = self.bn3(self.conv3(x)) + self.bn1(self.conv1(x))
        if self.reserved:  # one split, not two slices: their gradients would be two maps of zeros and a sum
            passed, rest = x.split([self.reserved, self.channels - self.reserved], 1)
            if self.bn0 is not None:
                out = out + self.bn0(rest.contiguous(memory_format=torch.channels_last))
            out = torch.cat([passed, out], 1)
        elif self.bn0 is not None:
            out = out + self.bn0(x)
        return self.relu(out if self.se is None else self.se(out))


class RepVGG(nn.Module):
    """Two stem blocks, four stages, pool, linear; (N, in_channels, H, W) to (N, num_classes).

    A stage is a block of stride 2 (but for the first stage) and `pairs` pairs of a reserving block and a RepVGG block.
    """

    def __init__(
        self, num_classes: int, in_channels: int, *, pairs: int, ratios: Sequence[float], width: int,
        stem_strides: tuple[int, int], squeeze_excitation: bool,
    ) -> None:  # fmt: skip
        super().__init__()

        def block(before: int, after: int, stride: int = 1, ratio: float = 0.0) -> RepVGGBlock:
            reserved = int(after * ratio)
            return RepVGGBlock(before, after, stride=stride, reserved=reserved, squeeze_excitation=squeeze_excitation)

        self.stem = nn.Sequential(block(in_channels, width, stem_strides[0]), block(width, width, stem_strides[1]))
        stages = []
        channels = width
        for stage, ratio in enumerate(ratios):
            layers = []
            if stage:
                layers.append(block(channels, 2 * channels, 2))
                channels *= 2
            for _ in range(pairs):
                layers += [block(channels, channels, 1, ratio), block(channels, channels)]
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.stages(self.stem(x)))))


def repvgg(
    name: str = "repvgg",
    *,
    depth: int | None = None,
    num_classes: int = 1000,
    in_channels: int = 3,
    reserve_ratio: float | Sequence[float] = 0.0,
    width: int = 64,
    small_images: bool = False,
    stem_strides: tuple[int, int] | None = None,
    squeeze_excitation: bool = False,
) -> RepVGG:
    """RepVGG of `depth` 3x3 layers (default 21), 8n + 5 (the paper: 21, 37, 69, 133), with a reserve ratio.

    name: repvgg, or repvgg{depth}.

    reserve_ratio: fraction 0 to 1 of the channels that every second block passes on, one for all or one for each of the
    four stages; 0 is RepVGG. width: channels of the first stage (doubled by each stage). small_images: stem of strides
    1, 1 instead of 2, 2; stem_strides: any others. squeeze_excitation: a gate before every ReLU, which reserved channels
    bypass (the paper's rmrepse). Raises ConfigError.
    """
    named = name.removeprefix("repvgg")
    if named and depth not in (None, int(named)):
        raise ConfigError(f"{name} with depth={depth}: say it once")
    depth = int(named or depth or 21)
    pairs, rest = divmod(depth - 5, 8)
    if pairs < 1 or rest:
        raise ConfigError(f"repvgg: depth {depth} is not 8n + 5 (13, 21, 37, 69, 133, ...)")
    ratios = (float(reserve_ratio),) * 4 if isinstance(reserve_ratio, int | float) else tuple(reserve_ratio)
    if len(ratios) != 4 or not all(0 <= ratio <= 1 for ratio in ratios):
        raise ConfigError(
            f"repvgg: reserve_ratio {reserve_ratio} is not one number (or four, by stage) between 0 and 1"
        )
    return RepVGG(
        num_classes, in_channels, pairs=pairs, ratios=ratios, width=width,
        stem_strides=stem_strides or ((1, 1) if small_images else (2, 2)), squeeze_excitation=squeeze_excitation,
    )  # fmt: skip
