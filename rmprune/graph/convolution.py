"""Linear layers as data: convolutions, scales and shifts, batch norms folded. Knows nothing of graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmprune.graph.obstacle import Obstacle

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Where a linear layer reads: output i, tap t reads input `stride * i + dilation * t - padding`, on each axis."""

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    padding_mode: str = "zeros"

    @property
    def pointwise(self) -> bool:
        """Whether each output position reads its own input position alone."""
        return self.kernel == (1, 1) and self.padding == (0, 0)

    @property
    def padded(self) -> bool:
        """Whether the border reads zeros (or what `padding_mode` puts there)."""
        return self.padding != (0, 0)


@dataclass(frozen=True)
class Norm:
    """A batch norm after a linear layer. Rows in `measured` are still to be measured and change nothing in eval mode."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    eps: float
    measured: Tensor  # bool
    momentum: float | None = 0.1

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """y -> y * scale + shift, with scale = weight / sqrt(variance + eps) and shift = bias - mean * scale."""
        scale = self.weight / torch.sqrt(self.variance + self.eps)
        shift = self.bias - self.mean * scale
        return torch.where(self.measured, 1.0, scale), torch.where(self.measured, 0.0, shift)


def to_measure(channels: int, like: Norm | None = None) -> Norm:
    """A norm all of whose rows are still to be measured, with the eps and momentum of another."""
    one, zero = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    eps, momentum = (1e-5, 0.1) if like is None else (like.eps, like.momentum)
    return Norm(one, zero, zero, one, eps, torch.ones(channels, dtype=torch.bool), momentum)


@dataclass(frozen=True)
class Pattern:
    """Where the weights of a dense kernel are that may not be zero: rows x columns, and single (out, in) pairs beside it."""

    rows: Tensor
    columns: Tensor
    pair_rows: Tensor
    pair_columns: Tensor


@dataclass(frozen=True)
class Conv:
    """A linear layer, and the batch norm after it, as data in float64. The weight is built when asked for, not before.

    `weight()` has shape (out, in / groups, kh, kw); `bias` (out,); both before `norm`.
    """

    weight: Callable[[], Tensor]
    bias: Tensor
    in_channels: int
    geometry: Geometry = Geometry()
    groups: int = 1
    norm: Norm | None = None
    name: str = ""
    norm_name: str = ""
    rewritten: bool = False
    pattern: Pattern | None = None

    @property
    def out_channels(self) -> int:
        """Rows of its weight."""
        return len(self.bias)

    def weight_count(self) -> int:
        """Entries of its weight: out_channels * in_channels / groups * kernel."""
        kernel = self.geometry.kernel
        return self.out_channels * (self.in_channels // self.groups) * kernel[0] * kernel[1]

    def macs(self, out_size: Pair) -> int:
        """Multiply-accumulates for one image whose output has `out_size` pixels."""
        return self.weight_count() * out_size[0] * out_size[1]

    def params(self) -> int:
        """Parameters of the module it becomes: the weight, and a bias or the scale and shift of a batch norm."""
        return self.weight_count() + self.out_channels * (1 if self.norm is None else 2)

    def folded(self) -> Conv:
        """The same function without norm: weight * scale, bias * scale + shift."""
        if self.norm is None:
            return self
        own, (scale, shift) = self.weight, self.norm.scale_shift()
        scaled = lambda: own() * scale[:, None, None, None]  # noqa: E731
        return replace(self, weight=scaled, bias=self.bias * scale + shift, norm=None)


def norm_of(bn: _BatchNorm) -> Norm:
    """The numbers of an eval-mode batch norm with running statistics, in float64."""
    assert bn.running_mean is not None and bn.running_var is not None
    mean, variance = bn.running_mean.detach().double().cpu(), bn.running_var.detach().double().cpu()
    weight = torch.ones_like(mean) if bn.weight is None else bn.weight.detach().double().cpu()
    bias = torch.zeros_like(mean) if bn.bias is None else bn.bias.detach().double().cpu()
    return Norm(weight, bias, mean, variance, bn.eps, torch.zeros(len(mean), dtype=torch.bool), bn.momentum)


def with_norm(conv: Conv, norm: Norm, norm_name: str) -> Conv:
    """The batch norm that follows `conv` joins it; a convolution that has one already is folded first."""
    conv = conv.folded()
    return replace(conv, norm=norm, norm_name=norm_name)


def pointwise(layer: nn.Linear, name: str = "") -> Conv:
    """A linear layer on vectors as a 1x1 convolution."""
    weight = layer.weight.detach().double().cpu()[:, :, None, None]
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().cpu()
    return Conv(lambda: weight, bias, weight.shape[1], name=name)


def depthwise(kernel: Tensor, bias: Tensor, geometry: Geometry, name: str = "") -> Conv:
    """One kernel (channels, kh, kw) a channel."""
    return Conv(lambda: kernel[:, None], bias, len(bias), geometry, len(bias), name=name)


def identity(channels: int, name: str = "") -> Conv:
    """The dense 1x1 convolution that changes nothing."""
    eye = lambda: torch.eye(channels, dtype=torch.float64)[:, :, None, None]  # noqa: E731
    return Conv(eye, torch.zeros(channels, dtype=torch.float64), channels, name=name)


def dense(conv: Conv) -> Conv:
    """The same layer with groups=1."""
    if conv.groups == 1:
        return conv
    return replace(conv, weight=lambda: dense_weight(conv), groups=1)


def dense_weight(conv: Conv) -> Tensor:
    """The kernel of a grouped layer over all input channels, (out, in, kh, kw)."""
    weight, groups = conv.weight(), conv.groups
    if groups == 1:
        return weight
    rows, cols = coordinates(conv)
    full = weight.new_zeros(conv.out_channels, conv.in_channels, *weight.shape[2:])
    full[rows, cols] = weight
    return full


def coordinates(conv: Conv) -> tuple[Tensor, Tensor]:
    """Row and dense input channel of each (out, in / groups) entry of a grouped kernel."""
    width = conv.in_channels // conv.groups
    rows = torch.arange(conv.out_channels)[:, None]
    cols = rows // (conv.out_channels // conv.groups) * width + torch.arange(width)[None]
    return rows.expand_as(cols), cols


def from_module(module: nn.Module, channels: int, name: str = "") -> Conv:
    """A module that reads `channels` channels as a linear layer. Raises Obstacle where it cannot be written as one kernel."""
    if isinstance(module, nn.Conv2d) and plain(module, nn.Conv2d):
        return _from_conv(module, name)
    if isinstance(module, nn.BatchNorm2d) and plain(module, nn.BatchNorm2d):
        if module.running_mean is None:
            raise Obstacle("a batch norm without running statistics")
        one = torch.ones(channels, 1, 1, dtype=torch.float64)
        conv = depthwise(one, torch.zeros(channels, dtype=torch.float64), Geometry(), name)
        return replace(conv, norm=norm_of(module), norm_name=name)
    numbers = module.factor if isinstance(module, Scale) else module.shift if isinstance(module, Shift) else None
    if numbers is not None and numbers.numel() not in (1, channels):
        raise Obstacle("an operation that makes many channels of one")
    if isinstance(module, Scale):
        factor = module.factor.detach().double().cpu().flatten().expand(channels)
        return depthwise(factor[:, None, None], torch.zeros(channels, dtype=torch.float64), Geometry(), name)
    if isinstance(module, Shift):
        one = torch.ones(channels, 1, 1, dtype=torch.float64)
        return depthwise(one, module.shift.detach().double().cpu().flatten().expand(channels), Geometry(), name)
    if isinstance(module, nn.AvgPool2d) and plain(module, nn.AvgPool2d):
        return _from_average_pool(module, channels, name)
    raise Obstacle(f"{type(module).__name__} is no convolution, batch norm, average pool or scaling")


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module of this kind does what the kind does: a subclass may have a forward of its own (timm's Conv2dSame)."""
    same = getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
    return same and type(module).forward is kind.forward


class Scale(nn.Module):
    """Multiplies by one number, or by one number a channel; stands for `x * 0.1` in a traced graph. A parameter stays one."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        _hold(self, "factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Shift(nn.Module):
    """Adds one number, or one number a channel; stands for `x + shift` in a traced graph. A parameter stays one."""

    shift: Tensor

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        _hold(self, "shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def _hold(module: nn.Module, name: str, numbers: Tensor) -> None:
    """One number as (1,), one a channel as (C, 1, 1), which artifacts read as they are."""
    own = numbers.detach().clone().reshape((-1, 1, 1) if numbers.numel() > 1 else (1,))
    if isinstance(numbers, nn.Parameter):
        module.register_parameter(name, nn.Parameter(own, requires_grad=numbers.requires_grad))
    else:
        module.register_buffer(name, own)


def _from_conv(module: nn.Conv2d, name: str) -> Conv:
    padding = module.padding
    if isinstance(padding, str):
        total = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ]
        if any(t % 2 for t in total):
            raise Obstacle("a convolution with more padding on one side than on the other")
        padding = (total[0] // 2, total[1] // 2)
    geometry = Geometry(
        _pair(module.kernel_size), _pair(module.stride), _pair(padding), _pair(module.dilation), module.padding_mode
    )
    weight = module.weight.detach().double().cpu()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double().cpu()
    return Conv(lambda: weight, bias, module.in_channels, geometry, module.groups, name=name)


def _from_average_pool(module: nn.AvgPool2d, channels: int, name: str) -> Conv:
    kernel, padding = _pair(module.kernel_size), _pair(module.padding)
    stride = kernel if module.stride is None else _pair(module.stride)
    if padding != (0, 0) and not module.count_include_pad:
        raise Obstacle("an average pool that counts fewer pixels at the border (count_include_pad=False with padding)")
    divisor = module.divisor_override or kernel[0] * kernel[1]
    taps = torch.full((channels, *kernel), 1.0 / divisor, dtype=torch.float64)
    return depthwise(taps, torch.zeros(channels, dtype=torch.float64), Geometry(kernel, stride, padding), name)


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def times(a: Pair, b: Pair) -> Pair:
    """Along each axis the product: of strides one after the other."""
    return a[0] * b[0], a[1] * b[1]


def output_size(geometry: Geometry, size: Pair) -> Pair:
    """Pixels of the output."""
    height, width = positions(size, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    return height, width


def positions(size: Iterable[int], *window: Iterable[int]) -> tuple[int, ...]:
    """Along each axis how often a window fits into so many pixels; `window`: kernel, stride, padding, dilation."""
    axes = zip(size, *window, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
