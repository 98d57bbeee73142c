"""Least-squares reconstruction of one layer behind pruned channels: tensor maths only.

The pruned layer reads fewer channels, which may have drifted as well (everything before it is pruned too). Its weights are
chosen so that its outputs come as near as possible to those of the unpruned network, with an intercept (AMC's code has none)
and for every kernel size, dense, grouped or depthwise (AMC's code does 1x1 only). After "Channel Pruning for Accelerating
Very Deep Neural Networks" (He et al. 2017), equation 2, asymmetric: inputs of the pruned, outputs of the unpruned network.
"""

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


def reconstruct(
    weight: Tensor, patches: Tensor, wanted: Tensor, groups: int, *, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The weight and bias that bring a layer's outputs nearest to `wanted`.

    weight [c_out, c_in / groups, ...]: where to start from; patches [S, c_in, kh*kw]; wanted [S, c_out], the unpruned
    layer's outputs with or without its bias. Minimises |wanted - patches W' - b|² + ridge * v * |W' - W|² with v the mean
    variance of the inputs times S, so that directions the samples do not show stay as they were. Returns (W', b [c_out]).
    """
    samples, cout = wanted.shape
    x = patches.reshape(samples, groups, -1).transpose(0, 1).double()  # [g, S, d]
    w = weight.reshape(groups, cout // groups, -1).transpose(1, 2).double()  # [g, d, c_out / g]
    y = wanted.reshape(samples, groups, -1).transpose(0, 1).double()  # [g, S, c_out / g]
    x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    centred = x - x_mean
    gram = centred.transpose(1, 2) @ centred
    strength = ridge * gram.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-12)
    residue = (y - y_mean) - centred @ w
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    w = w + torch.linalg.solve(gram + strength * identity, centred.transpose(1, 2) @ residue)
    bias = (y_mean - x_mean @ w).squeeze(1).flatten()
    return w.transpose(1, 2).reshape(weight.shape).to(weight), bias.to(weight)
