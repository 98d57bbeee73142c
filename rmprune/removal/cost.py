"""What the layers of a graph cost, in all and by block: MACs for one image, and parameters. Nothing is built for it."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from torch import fx, nn

from rmprune.graph.convolution import Conv
from rmprune.graph.network import Network, shape_of, spatial

BlockCost = tuple[int, int]


def cost_of(network: Network, nodes: Iterable[fx.Node], batch_norm: bool = True) -> BlockCost:
    """(MACs of convolutions and linear layers, parameters) of these nodes; batch_norm=False: without norms of convolutions as data."""
    own = {(node.op, node.target): node for node in nodes if node.op in ("call_module", "get_attr")}
    costs = [_cost(network, node, batch_norm) for node in own.values()]
    return sum(macs for macs, _ in costs), sum(params for _, params in costs)


def _cost(network: Network, node: fx.Node, batch_norm: bool) -> BlockCost:
    layer = network.own(node)
    if isinstance(layer, Conv):
        conv = layer if batch_norm else replace(layer, norm=None)
        return conv.macs(spatial(node)), conv.params()
    if isinstance(layer, nn.Parameter):
        return 0, layer.numel()
    if not isinstance(layer, nn.Module):
        return 0, 0
    macs = layer.weight.numel() * math.prod(spatial(node)) if isinstance(layer, nn.Conv2d) else 0
    if isinstance(layer, nn.Linear):
        macs = layer.weight.numel() * math.prod((shape_of(node) or ())[1:-1])
    return macs, sum(parameter.numel() for parameter in layer.parameters())


def by_block(network: Network, batch_norm: bool = True) -> dict[str, BlockCost]:
    """The cost of each block's layers, by node.meta["block"], and of the rest under ""; nothing for other names."""
    nodes: dict[str, list[fx.Node]] = defaultdict(list)
    for node in network.graph.nodes:
        nodes[node.meta.get("block", "")].append(node)
    return defaultdict(lambda: (0, 0)) | {name: cost_of(network, each, batch_norm) for name, each in nodes.items()}


def parameters(network: Network) -> int:
    """The values of all parameters of a network as it was read, those that several layers share once."""
    owned = [p for layer in network.layers.values() if isinstance(layer, nn.Module) for p in layer.parameters()]
    owned += [constant for constant in network.constants.values() if isinstance(constant, nn.Parameter)]
    return sum(p.numel() for p in {id(p): p for p in owned}.values())
