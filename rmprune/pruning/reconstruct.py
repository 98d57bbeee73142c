"""Least-squares reconstruction of one layer behind pruned channels: tensor maths only.

The pruned layer reads fewer channels, which may have drifted as well (everything before it is pruned too). Its weights are
chosen so that its outputs come as near as possible to those of the unpruned network, with an intercept (AMC's code has none)
and for every kernel size, dense, grouped or depthwise (AMC's code does 1x1 only). After "Channel Pruning for Accelerating
Very Deep Neural Networks" (He et al. 2017), equation 2, asymmetric: inputs of the pruned, outputs of the unpruned network.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        w = self.w + _solve(self.gram, self.slope, ridge) if math.isfinite(ridge) else self.w
        return w, self.y_mean - self.x_mean @ w


def _solve(gram: Tensor, slope: Tensor, ridge: float) -> Tensor:
    """(gram + ridge * v)^-1 slope with v the mean of gram's diagonal: gram [..., d, d], slope [..., d, e], the result as slope."""
    strength = (ridge * gram.diagonal(dim1=-2, dim2=-1).mean()).clamp(min=1e-30)
    return torch.linalg.solve(gram + strength * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), slope)


def _grouped(weight: Tensor, patches: Tensor, wanted: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    samples, cout = wanted.shape
    x = patches.reshape(samples, groups, -1).transpose(0, 1).double()
    w = weight.reshape(groups, cout // groups, -1).transpose(1, 2).double()
    return x, wanted.reshape(samples, groups, -1).transpose(0, 1).double(), w


def _ungrouped(w: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return w.transpose(1, 2).reshape(weight.shape).to(weight), bias.flatten().to(weight)


POSITIONS = 40  # of the maps for each unknown of a fit, at least 40,000
RIDGE = 1e-3  # relative to the mean square of what the convolution reads


def least_squares(
    conv: nn.Conv2d, read: Tensor, wanted: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Weight and bias with which `conv` of `read` (N, C, H, W) comes nearest to `wanted` (N, O, H', W'); the squared error at a position.

    On randomly drawn positions of all images, with a ridge of RIDGE relative to the mean square of what is read.
    """
    columns = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    each = min(wanted[0, 0].numel(), -(-max(40_000, POSITIONS * columns) // len(read)))
    size = columns + 1 + conv.out_channels  # inputs, 1, outputs
    moments = torch.zeros(size, size, dtype=torch.float64, device=read.device)
    for images, targets in zip(read.split(64), wanted.split(64), strict=True):
        taps = F.unfold(images, conv.kernel_size, padding=conv.padding, stride=conv.stride)  # type: ignore[arg-type]
        where = torch.randperm(taps.shape[2], generator=generator)[:each].to(read.device)
        rows = torch.cat(
            [taps[:, :, where], taps.new_ones(len(images), 1, len(where)), targets.flatten(2)[:, :, where]], 1
        )
        rows = rows.transpose(1, 2).reshape(-1, size)
        moments += (rows.T @ rows).double()
    count = moments[columns, columns]
    mean = moments[columns] / count
    centred = moments / count - torch.outer(mean, mean)
    inputs, cross, spread = (
        centred[:columns, :columns],
        centred[:columns, columns + 1 :],
        centred.diagonal()[columns + 1 :],
    )
    weight = _solve(inputs, cross, RIDGE)  # columns x outputs
    error = spread - 2 * (weight * cross).sum(0) + (weight * (inputs @ weight)).sum(0)
    bias = mean[columns + 1 :] - mean[:columns] @ weight
    return weight.T.reshape(conv.weight.shape).to(read), bias.to(read), float(error.sum())
