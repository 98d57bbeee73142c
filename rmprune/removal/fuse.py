"""Joins linear layers that follow each other: batch norms into convolutions, convolution after convolution (RM.md 3, last rows).

Two convolutions become one where their product is exact and, under the rule "cheaper", has no more MACs than the pair.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from rmprune.removal.kernels import Conv, compose, from_module, to_measure, with_norm
from rmprune.removal.linear_nodes import linear_layer
from rmprune.removal.network import Network, shape_of
from rmprune.removal.ranges import spatial

RULES = ("cheaper", "always", "never")


def join_norms(network: Network) -> None:
    """Every batch norm right after a convolution that nothing else reads becomes part of it."""
    for node in list(network.graph.nodes):
        layer = network.layer(node)
        source = node.args[0] if node.args else None
        if not isinstance(layer, nn.BatchNorm2d) or not isinstance(source, fx.Node) or len(source.users) > 1:
            continue
        before = network.layer(source)
        if isinstance(before, nn.Conv2d):
            found = from_module(before, before.in_channels, str(source.target))
            if isinstance(found, str):
                continue
            before = found
        norm = from_module(layer, layer.num_features, str(node.target))
        if not isinstance(before, Conv) or before.norm is not None or isinstance(norm, str) or norm.norm is None:
            continue
        network.layers[str(source.target)] = with_norm(before, norm.norm, str(node.target))
        _drop(network, node, source)


def fuse_convolutions(network: Network, rule: str) -> int:
    """Multiplies neighbouring convolutions, first to last; returns how many went. Sizes are those the network was traced with."""
    if rule == "never":
        return 0
    join_norms(network)
    count = 0
    for node in list(network.graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, fx.Node) or len(source.users) > 1:
            continue
        pair = _conv(network, source), _conv(network, node)
        if pair[0] is None or pair[1] is None:
            continue
        product = _product(pair[0], pair[1], source, node, rule)
        if product is not None:
            network.layers[str(node.target)] = product
            _bypass(network, source, node)
            count += 1
    return count


def _conv(network: Network, node: fx.Node) -> Conv | None:
    layer = network.layer(node)
    if isinstance(layer, Conv):
        return layer
    if isinstance(layer, nn.Conv2d):
        found = linear_layer(network, node)
        return found if isinstance(found, Conv) else None
    return None


def _product(first: Conv, second: Conv, source: fx.Node, node: fx.Node, rule: str) -> Conv | None:
    product = compose(first, second)
    if product is None:
        return None
    size, out_size = spatial(source), spatial(node)
    if rule == "cheaper" and product.macs(out_size) > first.macs(size) + second.macs(out_size):
        return None
    norms = [conv.norm for conv in (second, first) if conv.norm is not None]
    norm = to_measure(product.out_channels, norms[0]) if norms else None
    return replace(product, norm=norm, norm_name=second.norm_name, rewritten=first.rewritten or second.rewritten)


def _drop(network: Network, node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    source.meta.update({k: v for k, v in node.meta.items() if k in ("shape", "range")})
    network.layers.pop(str(node.target), None)
    network.graph.erase_node(node)


def _bypass(network: Network, source: fx.Node, node: fx.Node) -> None:
    before = source.args[0]
    assert isinstance(before, fx.Node) and shape_of(before) is not None
    node.args = (before,)
    network.layers.pop(str(source.target), None)
    network.graph.erase_node(source)
