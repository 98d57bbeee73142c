"""Convolutions as data, run against the modules that they stand for."""

import torch
from torch import Tensor, nn

from rmprune.graph.build import build_conv
from rmprune.graph.convolution import (
    Conv,
    from_module,
)


def data(module: nn.Module, channels: int) -> Conv:
    return from_module(module, channels)


def run(layer: Conv, x: Tensor) -> Tensor:
    return build_conv(layer.folded())(x)


def x_of(channels: int, size: int = 7) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
