"""Activations that code writes out, such as relu6(x + 3) / 6, as the stock modules that they are. Finds nothing else."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from rmprune.graph.convolution import Scale
from rmprune.graph.network import Network

_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_DIVIDES = (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_")
_MULTIPLIES = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_TIMES_X: dict[object, type[nn.Module]] = {nn.Hardsigmoid: nn.Hardswish, nn.Sigmoid: nn.SiLU}


def name_activations(network: Network) -> None:
    """Rewrites relu6(x + 3) / 6 as Hardsigmoid, x times that as Hardswish, and x * sigmoid(x) as SiLU, in place."""
    for node in list(network.graph.nodes):
        source = _of_hard_sigmoid(network, node)
        if source is not None:
            _replace(network, node, source, nn.Hardsigmoid())
    for node in list(network.graph.nodes):
        factors = node.all_input_nodes if node.target in _MULTIPLIES else []
        for source, factor in (factors, factors[::-1]) if len(factors) == 2 else ():
            found = _TIMES_X.get(type(network.layer(factor)))
            if found is not None and factor.args[0] is source:
                _replace(network, node, source, found())
                break
    network.drop_unread()


def _of_hard_sigmoid(network: Network, node: fx.Node) -> fx.Node | None:
    """x, where the node is relu6(x + 3) / 6."""
    layer = network.layer(node)
    sixth = node.target in _DIVIDES and node.args[1:] == (6,) and not node.kwargs
    sixth |= isinstance(layer, Scale) and layer.factor.numel() == 1 and float(layer.factor) == 1 / 6
    clipped = node.args[0] if sixth else None
    if not isinstance(clipped, fx.Node):
        return None
    clip = network.layer(clipped)
    if not isinstance(clip, nn.Hardtanh) or (clip.min_val, clip.max_val) != (0, 6):  # a ReLU6 is one
        return None
    plus = clipped.args[0]
    if not isinstance(plus, fx.Node) or plus.target not in _ADDS or plus.kwargs or 3 not in plus.args:
        return None
    return plus.all_input_nodes[0]


def _replace(network: Network, node: fx.Node, source: fx.Node, module: nn.Module) -> None:
    with network.graph.inserting_before(node):
        new = network.graph.call_module(network.add(f"{node.name}_{type(module).__name__.lower()}", module), (source,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    network.graph.erase_node(node)
    network.layers.pop(str(node.target), None)
