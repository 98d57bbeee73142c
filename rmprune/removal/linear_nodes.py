"""Nodes of a graph as linear layers: convolutions, batch norms, average pools, crops, padding with channels of zeros."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rmprune.removal.geometry import output_size
from rmprune.removal.kernels import Conv, Geometry, from_module
from rmprune.removal.network import Network, shape_of
from rmprune.removal.ranges import spatial
from rmprune.removal.reasons import describe


def linear_layer(network: Network, node: fx.Node) -> Conv | str:
    """The node as a linear layer, or why it is none."""
    shape = shape_of(node)
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    before = shape_of(source) if source is not None else None
    if source is None or shape is None or before is None or len(shape) != 4 or len(before) != 4:
        return f"{describe(network, node)} does not read one map (batch, channels, height, width)"
    layer = network.layer(node)
    if isinstance(layer, Conv):
        return layer
    if layer is None:
        found: Conv | str = (
            _crop(node, before[1]) if node.target is operator.getitem else _pad_channels(network, node, before[1])
        )
    else:
        found = from_module(layer, before[1], str(node.target))
    if isinstance(found, Conv) and output_size(found.geometry, spatial(source)) != spatial(node):
        return f"{node.target}: partial windows at the border of this input size (ceil_mode)"
    return found


def _crop(node: fx.Node, channels: int) -> Conv | str:
    """x[:, a:b, ::r, ::s]: some channels, subsampled."""
    index: Any = node.args[1]
    plain = isinstance(index, tuple) and 2 <= len(index) <= 4 and all(isinstance(i, slice) for i in index)
    if not plain or index[0] != slice(None) or any(i.start or i.stop is not None for i in index[2:]):
        return "an indexing other than x[:, a:b, ::r, ::s]"
    if not all(isinstance(end, int | None) for i in index for end in (i.start, i.stop, i.step)):
        return "an indexing that depends on the input"
    taken = torch.arange(channels)[index[1]]
    steps = [i.step or 1 for i in index[2:]] + [1] * (4 - len(index))
    weight = torch.eye(channels, dtype=torch.float64)[taken][:, :, None, None]
    return Conv(lambda: weight, _zeros(len(taken)), channels, Geometry(stride=(steps[0], steps[1])), name=node.name)


def _pad_channels(network: Network, node: fx.Node, channels: int) -> Conv | str:
    """F.pad(x, (0, 0, 0, 0, a, b)): channels of zeros before and after."""
    arguments: list[Any] = list(node.args[1:]) + list(node.kwargs.values())
    pad = arguments[0] if arguments else None
    zeros = all(a in ("constant", 0, 0.0, None) for a in arguments[1:])
    if node.target is not torch.nn.functional.pad or not isinstance(pad, list | tuple) or len(pad) < 6 or not zeros:
        return f"{describe(network, node)} is no linear layer that a kernel stands for"
    if any(pad[:4]) or any(pad[6:]) or min(pad[4:6]) < 0:
        return "a padding of more than channels"
    weight = torch.cat(
        [torch.zeros(pad[4], channels), torch.eye(channels), torch.zeros(pad[5], channels)]
    ).double()[:, :, None, None]  # fmt: skip
    return Conv(lambda: weight, _zeros(len(weight)), channels, name=node.name)


def _zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.float64)
