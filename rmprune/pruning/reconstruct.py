"""Least-squares reconstruction of one layer behind pruned channels: tensor maths only.

The pruned layer reads fewer channels, which may have drifted as well (everything before it is pruned too). Its weights are
chosen so that its outputs come as near as possible to those of the unpruned network, with an intercept (AMC's code has none)
and for every kernel size, dense, grouped or depthwise (AMC's code does 1x1 only). After "Channel Pruning for Accelerating
Very Deep Neural Networks" (He et al. 2017), equation 2, asymmetric: inputs of the pruned, outputs of the unpruned network.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rmprune.pruning.structure import Layer


@dataclass(frozen=True)
class Positions:
    """Output positions at which a layer is fitted: image [S], row [S], column [S]."""

    image: Tensor
    row: Tensor
    column: Tensor


def sample_positions(images: int, size: tuple[int, int], count: int, generator: torch.Generator) -> Positions:
    """`count` positions in each of `images` outputs of (height, width) `size`, drawn with replacement (all if fewer)."""
    height, width = size
    if height * width <= count:
        flat = torch.arange(height * width).repeat(images, 1)
    else:
        flat = torch.randint(height * width, (images, count), generator=generator)
    image = torch.arange(images)[:, None].expand_as(flat)
    return Positions(image.flatten(), (flat // width).flatten(), (flat % width).flatten())


def outputs_at(y: Tensor, at: Positions) -> Tensor:
    """[S, c] of feature maps [N, c, h, w] or rows [N, c]."""
    return (y[at.image, :, at.row, at.column] if y.dim() == 4 else y[at.image]).float()


def patches_at(x: Tensor, layer: Layer, at: Positions) -> Tensor:
    """[S, c, kh*kw]: what the layer reads at each of its output positions, its zero padding included."""
    if x.dim() == 2:
        return x[at.image, :, None].float()
    pad_y, pad_x = layer.padding
    padded = F.pad(x, (pad_x, pad_x, pad_y, pad_y))
    taps = [
        padded[
            at.image,
            :,
            at.row * layer.stride[0] + i * layer.dilation[0],
            at.column * layer.stride[1] + j * layer.dilation[1],
        ]
        for i in range(layer.kernel[0])
        for j in range(layer.kernel[1])
    ]
    return torch.stack(taps, dim=2).float()


RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
"""Strengths that `reconstruct_checked` chooses among; infinity leaves the weights alone and fits the intercept."""


def reconstruct(
    weight: Tensor, patches: Tensor, wanted: Tensor, groups: int, *, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The weight and bias that bring a layer's outputs nearest to `wanted`.

    weight [c_out, c_in / groups, ...]: where to start from; patches [S, c_in, kh*kw]; wanted [S, c_out], the unpruned
    layer's outputs with or without its bias. Minimises |wanted - patches W' - b|² + ridge * v * |W' - W|² with v the mean
    variance of the inputs times S, so that directions the samples do not show stay as they were. Returns (W', b [c_out]).
    """
    x, y, w = _grouped(weight, patches, wanted, groups)
    return _ungrouped(*_Normal.of(x, y, w).solve(ridge), weight)


def reconstruct_checked(weight: Tensor, patches: Tensor, wanted: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """`reconstruct` with that ridge which, fitted to four fifths of the samples, comes nearest on the last fifth.

    Where samples are few for so many weights, little or nothing is changed but the intercept.
    """
    x, y, w = _grouped(weight, patches, wanted, groups)
    known = max(1, 4 * x.shape[1] // 5)
    part, unseen_x, unseen_y = _Normal.of(x[:, :known], y[:, :known], w), x[:, known:], y[:, known:]

    def error(ridge: float) -> float:
        found, bias = part.solve(ridge)
        return float((unseen_x @ found + bias - unseen_y).square().mean())

    best = min(RIDGES, key=error) if unseen_x.shape[1] else math.inf
    return _ungrouped(*_Normal.of(x, y, w).solve(best), weight)


@dataclass(frozen=True)
class _Normal:
    """The normal equations of some samples: x [g, S, d], y [g, S, e], w [g, d, e]."""

    w: Tensor
    x_mean: Tensor
    y_mean: Tensor
    gram: Tensor
    slope: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, w: Tensor) -> "_Normal":
        x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        centred = x - x_mean
        across = centred.transpose(1, 2)
        return cls(w, x_mean, y_mean, across @ centred, across @ ((y - y_mean) - centred @ w))

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        w = self.w
        if math.isfinite(ridge):
            strength = ridge * self.gram.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-12)
            identity = torch.eye(self.gram.shape[1], dtype=self.gram.dtype, device=self.gram.device)
            w = w + torch.linalg.solve(self.gram + strength * identity, self.slope)
        return w, self.y_mean - self.x_mean @ w


def _grouped(weight: Tensor, patches: Tensor, wanted: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    samples, cout = wanted.shape
    x = patches.reshape(samples, groups, -1).transpose(0, 1).double()
    w = weight.reshape(groups, cout // groups, -1).transpose(1, 2).double()
    return x, wanted.reshape(samples, groups, -1).transpose(0, 1).double(), w


def _ungrouped(w: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return w.transpose(1, 2).reshape(weight.shape).to(weight), bias.flatten().to(weight)
