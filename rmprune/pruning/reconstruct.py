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
BLOCK = 2048  # samples whose products are summed in the precision that they have


def reconstruct(
    weight: Tensor, patches: Tensor, wanted: Tensor, groups: int, *, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The weight and bias that bring a layer's outputs nearest to `wanted`.

    weight [c_out, c_in / groups, ...]: where to start from; patches [S, c_in, kh*kw]; wanted [S, c_out], the unpruned
    layer's outputs with or without its bias. Minimises |wanted - patches W' - b|² + ridge * v * |W' - W|² with v the mean
    variance of the inputs times S, so that directions the samples do not show stay as they were. Returns (W', b [c_out]).
    """
    w = _grouped(weight, groups)
    return _ungrouped(w, *_Moments.of(w, patches, wanted, groups).solve(ridge), weight)


def reconstruct_checked(weight: Tensor, patches: Tensor, wanted: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """`reconstruct` with that ridge which, fitted to four fifths of the samples, comes nearest on the last fifth.

    Where samples are few for so many weights, little or nothing is changed but the intercept.
    """
    w, known = _grouped(weight, groups), max(1, 4 * len(wanted) // 5)
    part = _Moments.of(w, patches[:known], wanted[:known], groups)
    if known == len(wanted):
        return _ungrouped(w, *part.solve(math.inf), weight)
    unseen = _Moments.of(w, patches[known:], wanted[known:], groups)
    best = min(RIDGES, key=lambda ridge: unseen.error(*part.solve(ridge)))
    return _ungrouped(w, *part.joined(unseen).solve(best), weight)


@dataclass(frozen=True)
class _Moments:
    """What least squares need of some samples of x [S, g, d] and of r = y - x w [S, g, e], what the weights w lack: means, and sums of
    products about them, in float64.

    Products are summed in float32 over blocks of BLOCK samples, about the means of the first of them, and blocks in float64: of the
    largest entry they are off by about 1e-6, a hundredth of the smallest ridge.
    """

    count: int
    x_mean: Tensor
    r_mean: Tensor
    gram: Tensor
    cross: Tensor
    spread: float

    @classmethod
    def of(cls, w: Tensor, patches: Tensor, wanted: Tensor, groups: int) -> "_Moments":
        samples, kind = len(wanted), patches.dtype

        def block(start: int) -> tuple[Tensor, Tensor]:
            some = slice(start, start + BLOCK)
            x = patches[some].reshape(-1, groups, w.shape[1]).transpose(0, 1)
            y = wanted[some].reshape(-1, groups, w.shape[2]).transpose(0, 1).to(kind)
            return x, torch.baddbmm(y, x, w.to(kind), alpha=-1)

        x_start, r_start = (part.mean(1, keepdim=True) for part in block(0))
        gram, cross, x_sum, r_sum = (
            torch.zeros(groups, *shape, dtype=torch.float64, device=w.device)
            for shape in ((w.shape[1], w.shape[1]), w.shape[1:], (1, w.shape[1]), (1, w.shape[2]))
        )
        spread = 0.0
        for start in range(0, samples, BLOCK):
            x, r = block(start)
            x, r = x - x_start, r - r_start
            gram += x.mT @ x
            cross += x.mT @ r
            x_sum += x.sum(1, keepdim=True)
            r_sum += r.sum(1, keepdim=True)
            spread += float(r.square().sum())
        x_off, r_off = x_sum / samples, r_sum / samples
        gram -= samples * x_off.mT @ x_off
        cross -= samples * x_off.mT @ r_off
        spread -= samples * float(r_off.square().sum())
        return cls(samples, x_start + x_off, r_start + r_off, gram, cross, spread)

    def joined(self, other: "_Moments") -> "_Moments":
        """The moments of both sets of samples."""
        count = self.count + other.count
        x, r, part = other.x_mean - self.x_mean, other.r_mean - self.r_mean, self.count * other.count / count
        return _Moments(
            count,
            self.x_mean + x * (other.count / count),
            self.r_mean + r * (other.count / count),
            self.gram + other.gram + part * x.mT @ x,
            self.cross + other.cross + part * x.mT @ r,
            self.spread + other.spread + part * float(r.square().sum()),
        )

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """What is added to the weights [g, d, e], and the intercept [g, 1, e] then."""
        more = _solve(self.gram, self.cross, ridge) if math.isfinite(ridge) else torch.zeros_like(self.cross)
        return more, self.r_mean - self.x_mean @ more

    def error(self, more: Tensor, bias: Tensor) -> float:
        """The squared error of these samples, summed."""
        rest = self.r_mean - self.x_mean @ more - bias
        inner = float((more * (self.gram @ more - 2 * self.cross)).sum())
        return self.spread + inner + self.count * float(rest.square().sum())


def _solve(gram: Tensor, slope: Tensor, ridge: float) -> Tensor:
    """(gram + ridge * v)^-1 slope with v the mean of gram's diagonal: gram [..., d, d], slope [..., d, e], the result as slope."""
    strength = (ridge * gram.diagonal(dim1=-2, dim2=-1).mean()).clamp(min=1e-30)
    return torch.linalg.solve(gram + strength * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), slope)


def _grouped(weight: Tensor, groups: int) -> Tensor:
    """[g, d, e] in float64."""
    return weight.reshape(groups, len(weight) // groups, -1).transpose(1, 2).double()


def _ungrouped(w: Tensor, more: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (w + more).transpose(1, 2).reshape(weight.shape).to(weight), bias.flatten().to(weight)


POSITIONS = 40  # of the maps for each unknown of a fit, at least 40,000
RIDGE = 1e-3  # relative to the mean variance of what the convolution reads


def least_squares(
    conv: nn.Conv2d, read: Tensor, wanted: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Weight and bias with which `conv` of `read` (N, C, H, W) comes nearest to `wanted` (N, O, H', W'); the squared error at a position.

    On randomly drawn positions of all images, with a ridge of RIDGE relative to the mean variance of what is read. Products are summed in
    the precision of `read`, about the means of the first images, and in float64 over the others.
    """
    columns = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    each = min(wanted[0, 0].numel(), -(-max(40_000, POSITIONS * columns) // len(read)))
    size = columns + 1 + conv.out_channels  # inputs, 1, outputs
    moments = torch.zeros(size, size, dtype=torch.float64, device=read.device)
    start: Tensor | None = None
    for images, targets in zip(read.split(64), wanted.split(64), strict=True):
        taps = F.unfold(images, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
        where = torch.randperm(taps.shape[2], generator=generator)[:each].to(read.device)
        rows = torch.cat(
            [taps[:, :, where], taps.new_ones(len(images), 1, len(where)), targets.flatten(2)[:, :, where]], 1
        )
        rows = rows.transpose(1, 2).reshape(-1, size)
        if start is None:
            start = rows.mean(0)
            start[columns] = 0.0
        rows = rows - start
        moments += (rows.T @ rows).double()
    count = moments[columns, columns]
    off = moments[columns] / count
    centred = moments / count - torch.outer(off, off)
    inputs, cross, spread = (
        centred[:columns, :columns],
        centred[:columns, columns + 1 :],
        centred.diagonal()[columns + 1 :],
    )
    weight = _solve(inputs, cross, RIDGE)  # columns x outputs
    error = spread - 2 * (weight * cross).sum(0) + (weight * (inputs @ weight)).sum(0)
    assert start is not None
    mean = start + off
    bias = mean[columns + 1 :] - mean[:columns] @ weight
    return weight.T.reshape(conv.weight.shape).to(read), bias.to(read), float(error.sum())
