"""Where on the maps a layer is fitted: some output positions of every image, what the layer reads there, and what it puts out."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rmprune.pruning.layers import SizedLayer


@dataclass(frozen=True)
class Positions:
    """Output positions at which a layer is fitted: image [S], row [S], column [S]."""

    image: Tensor
    row: Tensor
    column: Tensor

    def to(self, device: torch.device) -> "Positions":
        """The same on another device."""
        return Positions(self.image.to(device), self.row.to(device), self.column.to(device))


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


def patches_at(x: Tensor, layer: SizedLayer, at: Positions) -> Tensor:
    """[S, c, kh*kw]: what the layer reads at each of its output positions, its zero padding included."""
    if x.dim() == 2:
        return x[at.image, :, None].float()
    pad_y, pad_x = layer.padding
    padded = F.pad(x, (pad_x, pad_x, pad_y, pad_y)) if pad_x or pad_y else x
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
    return (torch.stack(taps, dim=2) if len(taps) > 1 else taps[0][..., None]).float()
