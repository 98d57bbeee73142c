"""Joins linear layers that follow each other: batch norms into convolutions, convolution after convolution (RM.md 3, last rows).

Two convolutions become one where their product is exact and, under the rule "cheaper", has no more MACs than the pair.
"""

import math
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from rmprune.graph.convolution import (
    Conv,
    Geometry,
    coordinates,
    dense_weight,
    from_module,
    times,
    to_measure,
    with_norm,
)
from rmprune.graph.network import Network, linear_layer, shape_of, spatial
from rmprune.graph.obstacle import or_none

RULES = ("cheaper", "always", "never")


def join_norms(network: Network) -> None:
    """Every batch norm right after a convolution that nothing else reads becomes part of it."""
    for node in list(network.graph.nodes):
        layer = network.layer(node)
        source = node.args[0] if node.args else None
        if not isinstance(layer, nn.BatchNorm2d) or not isinstance(source, fx.Node) or len(source.users) > 1:
            continue
        before = _conv(network, source)
        norm = or_none(from_module, layer, layer.num_features, str(node.target))
        if before is None or before.norm is not None or norm is None or norm.norm is None:
            continue
        network.layers[str(source.target)] = with_norm(before, norm.norm, str(node.target))
        source.meta.update({k: v for k, v in node.meta.items() if k in ("shape", "range")})
        network.bypass(node, source)


def fuse_convolutions(network: Network, rule: str, fused: Collection[str] = ()) -> int:
    """Multiplies neighbouring convolutions, first to last; returns how many went. Sizes are those the network was traced with.

    `fused`: blocks whose pairs always are; a pair belongs to the block that its first layer stands in, or else its second.
    """
    if rule == "never" and not fused:
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
        owner = source.meta.get("block") or node.meta.get("block")
        product = _product(pair[0], pair[1], source, node, "always" if owner in fused else rule)
        if product is not None:
            network.layers[str(node.target)] = product
            _bypass(network, source, node)
            count += 1
    return count


def _conv(network: Network, node: fx.Node) -> Conv | None:
    layer = network.layer(node)
    return or_none(linear_layer, network, node) if isinstance(layer, Conv | nn.Conv2d) else None


def _product(first: Conv, second: Conv, source: fx.Node, node: fx.Node, rule: str) -> Conv | None:
    first_folded, second_folded = first.folded(), second.folded()
    geometry = product_geometry(first_folded, second_folded)
    if geometry is None or rule == "never":
        return None
    size, out_size = spatial(source), spatial(node)
    inputs = first.in_channels // _common_groups(first, second)
    macs = math.prod((second.out_channels, inputs, *geometry.kernel, *out_size))
    if rule == "cheaper" and macs > first.macs(size) + second.macs(out_size):
        return None
    product = compose(first_folded, second_folded)
    assert product is not None
    norms = [conv.norm for conv in (second, first) if conv.norm is not None]
    norm = to_measure(product.out_channels, norms[0]) if norms else None
    return replace(product, norm=norm, norm_name=second.norm_name, rewritten=first.rewritten or second.rewritten)


def _bypass(network: Network, source: fx.Node, node: fx.Node) -> None:
    before = source.args[0]
    assert isinstance(before, fx.Node) and shape_of(before) is not None
    node.args = (before,)
    node.meta.setdefault("block", source.meta.get("block", ""))
    network.take_out(source)


def compose(first: Conv, second: Conv) -> Conv | None:
    """The one layer `second(first(x))`, or None where no single kernel is exact (a padded kernel after a bias, two wide kernels).

    With second 1x1: W[o, i] = sum_m W2[o, m] W1[m, i]. With first 1x1 the taps are those of the second. Norms are folded in.
    """
    first, second = first.folded(), second.folded()
    geometry = product_geometry(first, second)
    if geometry is None:
        return None
    groups = _common_groups(first, second)
    bias = second.bias + torch.einsum("omhw,m->o", dense_weight(second), first.bias)
    return Conv(
        lambda: _product_weight(first, second, groups), bias, first.in_channels, geometry, groups, name=second.name,
        norm_name=second.norm_name,
    )  # fmt: skip


def product_geometry(first: Conv, second: Conv) -> Geometry | None:
    """Where the product of two folded layers reads, or None where no single kernel is exact."""
    a, b = first.geometry, second.geometry
    if b.pointwise:
        return replace(a, stride=times(a.stride, b.stride))
    if not a.pointwise or (b.padded and bool(first.bias.any())):
        return None
    if b.padded and a.stride != (1, 1):
        return None  # the coarse map may end before the fine one does
    stride, padding, dilation = (times(a.stride, each) for each in (b.stride, b.padding, b.dilation))
    return Geometry(b.kernel, stride, padding, dilation, b.padding_mode)


def _common_groups(first: Conv, second: Conv) -> int:
    """Groups of the product: one layer that scales single channels keeps the other's groups."""
    if first.groups == second.groups:
        return first.groups
    if second.groups == second.in_channels == second.out_channels:
        return first.groups
    if first.groups == first.in_channels == first.out_channels:
        return second.groups
    return 1


def _product_weight(first: Conv, second: Conv, groups: int) -> Tensor:
    """The kernel (out, in / groups, kh, kw) of the product of two folded layers."""
    a, b = first.weight(), second.weight()
    # One of the two is 1x1, so the taps of the product are those of the other.
    if second.groups == second.in_channels == second.out_channels:
        return a * b
    if first.groups == first.in_channels == first.out_channels:
        return b * a[coordinates(second)[1], 0]
    if groups == 1:
        a, b = dense_weight(first), dense_weight(second)
    a = a.reshape(groups, -1, *a.shape[1:])
    b = b.reshape(groups, -1, *b.shape[1:])
    product = torch.einsum("gomhw,gmipq->goihwpq", b, a)
    return product.reshape(product.shape[0] * product.shape[1], product.shape[2], -1).reshape(
        -1, product.shape[2], product.shape[3] * product.shape[5], product.shape[4] * product.shape[6]
    )
