"""Runs a large convolution whose kernel is mostly zeros in a fraction of the time. Where it is zero is checked, not believed.

After removal a kernel is a dense block and single taps beside it (copies, identities). Checking with dense float64 convolutions
would take minutes for a ResNet-152.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmprune.removal.kernels import Block

_WORTH = 2**16  # weights; smaller kernels run dense


def sparse_forward(module: nn.Conv2d, x: Tensor, block: Block | None) -> Tensor:
    """module(x), (N, C, H, W). Outside of `block` the kernel must be zero; it runs dense where that is no gain, or not so."""
    weight = module.weight
    if block is None or weight.numel() < _WORTH or module.groups != 1 or module.padding_mode != "zeros":
        return module(x)
    rows, columns = weight.shape[:2]
    if len(block.pair_rows) > 4 * (rows + columns) or len(block.rows) * len(block.columns) > 0.7 * rows * columns:
        return module(x)
    own = _take(weight, block)
    inside = torch.zeros(weight.shape[:2], dtype=torch.bool)
    inside[block.rows[:, None], block.columns[None]] = True
    beside = ~inside[block.pair_rows, block.pair_columns]
    pairs = torch.unique(torch.stack([block.pair_rows[beside], block.pair_columns[beside]]), dim=1)
    taps = weight[pairs[0], pairs[1]]
    if torch.count_nonzero(own) + torch.count_nonzero(taps) != torch.count_nonzero(weight):
        return module(x)
    part = F.conv2d(x[:, block.columns], own, None, module.stride, module.padding, module.dilation)
    out = x.new_zeros(len(x), module.out_channels, *part.shape[2:])
    out[:, block.rows] = part
    _add_taps(module, x, pairs[0], pairs[1], taps, out)
    return out if module.bias is None else out + module.bias[:, None, None]


def _take(weight: Tensor, block: Block) -> Tensor:
    rows, columns = len(block.rows), len(block.columns)
    if int(block.rows[-1]) == rows - 1 and int(block.columns[-1]) == columns - 1:
        return weight[:rows, :columns].contiguous()
    return weight[block.rows][:, block.columns]


def _add_taps(module: nn.Conv2d, x: Tensor, rows: Tensor, columns: Tensor, taps: Tensor, out: Tensor) -> None:
    """Adds weight * shifted input for every non-zero tap (E, kh, kw) of the (out, in) pairs."""
    top, left = int(module.padding[0]), int(module.padding[1])
    (down, right), (step_y, step_x) = module.stride, module.dilation
    padded = F.pad(x, (left, left, top, top)) if top or left else x
    height, width = out.shape[2:]
    for ky in range(taps.shape[1]):
        for kx in range(taps.shape[2]):
            used = taps[:, ky, kx] != 0
            if used.any():
                y0, x0 = ky * step_y, kx * step_x
                shifted = padded[
                    :, :, y0 : y0 + down * (height - 1) + 1 : down, x0 : x0 + right * (width - 1) + 1 : right
                ]
                out.index_add_(1, rows[used], shifted[:, columns[used]] * taps[used, ky, kx][:, None, None])
