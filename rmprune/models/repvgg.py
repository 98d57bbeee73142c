"""RepVGG with a reserve ratio (RM.md section 7; Meng et al. 2021, section 4.3) and its plain form for deployment.

The networks and their re-parameterisation only; the general core,
`rmprune.remove_residuals`, deploys them as well.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rmprune.errors import ConfigError, UnsupportedModel

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
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int = 1,
        reserved: int = 0,
        identity: bool = True,
        squeeze_excitation: bool = False,
    ) -> None:
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
        self,
        num_classes: int,
        in_channels: int,
        *,
        pairs: int,
        ratios: Sequence[float],
        width: int,
        stem_strides: tuple[int, int],
        squeeze_excitation: bool,
    ) -> None:
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
        num_classes,
        in_channels,
        pairs=pairs,
        ratios=ratios,
        width=width,
        stem_strides=stem_strides or ((1, 1) if small_images else (2, 2)),
        squeeze_excitation=squeeze_excitation,
    )


def _folded(weight: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a bias-free convolution followed by `bn` in eval mode."""
    assert bn.running_mean is not None and bn.running_var is not None
    return fuse_conv_bn_weights(weight, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)


@torch.no_grad()
def deployed_convolution(block: RepVGGBlock, like: Tensor) -> nn.Conv2d:
    """The one 3x3 convolution that equals a block in eval mode up to its gate and ReLU; dtype and device of `like`.

    Rows R on: W3' + pad(W1') + Dirac', the batch norms folded in; the first R rows are Dirac (RM.md section 7).
    """
    reserved, channels = block.reserved, block.channels
    computes = reserved < channels
    in_channels, stride = (block.conv3.in_channels, block.conv3.stride[0]) if computes else (channels, 1)
    conv = nn.Conv2d(in_channels, channels, 3, stride, 1).to(like)
    dirac = nn.init.dirac_(torch.empty_like(conv.weight))
    weight, shift = dirac.clone(), like.new_zeros(channels)
    if computes:
        kernel, bias = _folded(block.conv3.weight, block.bn3)
        pointwise, pointwise_bias = _folded(block.conv1.weight, block.bn1)
        kernel, bias = kernel + F.pad(pointwise, (1, 1, 1, 1)), bias + pointwise_bias
        if block.bn0 is not None:
            passed, passed_bias = _folded(dirac[reserved:], block.bn0)
            kernel, bias = kernel + passed, bias + passed_bias
        weight[reserved:], shift[reserved:] = kernel, bias
    conv.load_state_dict({"weight": weight, "bias": shift})
    return conv


@torch.no_grad()
def deployed_gate(gate: SqueezeExcitation) -> SqueezeExcitation:
    """A gate of all channels that equals `gate`: reserved ones get sigmoid(100), which is 1 in every float format."""
    channels = gate.down.in_channels
    full = SqueezeExcitation(channels, gate.down.out_channels).to(gate.up.weight)
    full.down.load_state_dict(gate.down.state_dict())
    weight, bias = torch.zeros_like(full.up.weight), gate.up.weight.new_full((channels,), 100.0)
    weight[gate.reserved :], bias[gate.reserved :] = gate.up.state_dict().values()
    full.up.load_state_dict({"weight": weight, "bias": bias})
    return full


def deploy(model: RepVGG) -> nn.Sequential:
    """The plain form of `model` in eval mode: a 3x3 convolution and a ReLU for each block; `model` is left alone.

    Exact: equal to `model.eval()` within rounding for every input. With squeeze-and-excitation the gates stay.
    Raises UnsupportedModel for anything but a RepVGG of this module.
    """
    if not isinstance(model, RepVGG):
        raise UnsupportedModel(f"deploy: {type(model).__name__} is no RepVGG; use rmprune.remove_residuals")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, block in model.named_modules():
        if isinstance(block, RepVGGBlock):
            name = name.replace(".", "_")
            layers[f"{name}_conv"] = deployed_convolution(block, model.fc.weight)
            if block.se is not None:
                layers[f"{name}_se"] = deployed_gate(block.se)
            layers[f"{name}_relu"] = nn.ReLU(inplace=True)
    layers |= {name: copy.deepcopy(getattr(model, name)) for name in ("pool", "flatten", "fc")}
    return nn.Sequential(layers).eval()
