"""Pieces of a map, x.split(...)[i] and x.chunk(...)[i], as slices of its channels. Computes nothing."""

from __future__ import annotations

import operator

import torch
from torch import fx

from rmprune.removal.network import Network, shape_of


def slice_pieces(network: Network) -> None:
    """Rewrites each such piece as x[:, a:b], in place; `propagate_shapes` has run."""
    for node in list(network.graph.nodes):
        index = node.args[1] if node.target is operator.getitem else None
        if not isinstance(index, int) or not isinstance(node.args[0], fx.Node):
            continue
        ends = _ends(node.args[0])
        if ends is not None and -len(ends) < index < len(ends):
            index %= len(ends)
            node.args = (node.args[0].args[0], (slice(None), slice(ends[index - 1] if index else 0, ends[index])))
    for node in reversed(list(network.graph.nodes)):
        if node.target in _CUTS and not node.users:
            network.graph.erase_node(node)


_CUTS = ("split", torch.split, "chunk", torch.chunk)


def _ends(node: fx.Node) -> list[int] | None:
    """The channel after the last of each piece; None where the node is no cut of a map along its channels."""
    if node.target not in _CUTS or not isinstance(node.args[0], fx.Node):
        return None
    shape = shape_of(node.args[0])
    names = ("split_size", "split_size_or_sections", "chunks")
    sizes = node.args[1] if len(node.args) > 1 else next((node.kwargs[n] for n in names if n in node.kwargs), None)
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if shape is None or len(shape) != 4 or dim not in (1, -3):
        return None
    channels = shape[1]
    if isinstance(sizes, list | tuple):
        if not all(isinstance(size, int) for size in sizes):
            return None
        return [sum(sizes[: i + 1]) for i in range(len(sizes))]
    if not isinstance(sizes, int) or sizes < 1:
        return None
    size = -(-channels // sizes) if node.target in ("chunk", torch.chunk) else sizes
    return [min(end, channels) for end in range(size, channels + size, size)]
