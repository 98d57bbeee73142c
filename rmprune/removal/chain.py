"""A way through the graph as a chain of layers: convolutions, activations, and gates over them. Changes nothing."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from rmprune.graph.activations import rule_of
from rmprune.graph.convolution import Conv, Pair, dense, identity, or_none, with_norm
from rmprune.graph.functional import is_size
from rmprune.graph.network import Network, is_batch_norm, linear_layer, shape_of, spatial
from rmprune.graph.ranges import Range, range_of

MULTIPLICATIONS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_RESHAPES = ("view", "reshape", "flatten", "unsqueeze", "squeeze", torch.flatten, torch.reshape, torch.unsqueeze)
_EXPANDS = ("expand", "expand_as")


@dataclass(frozen=True)
class ChainLayer:
    """One convolution of the branch, the activation after it, and the gate that multiplies what comes out (RM.md 3)."""

    conv: Conv
    activation: nn.Module | None
    activation_name: str
    size: Pair  # of its input, in pixels
    out_size: Pair
    range: Range  # of what the convolution emits, before the activation
    seen: Range | None  # the same as the examples showed it
    split: int = 0  # activation and gate are applied to so many channels from the first on; 0: to all
    gate: Gate | None = None


@dataclass(frozen=True)
class Gate:
    """y * g(y), where g pools y to one number a channel and puts these through layers (squeeze-and-excitation)."""

    pool: nn.Module
    pool_name: str
    layers: tuple[ChainLayer, ...]


@dataclass(frozen=True)
class GateNodes:
    """The multiplication y * g(y) in the graph: y, and what g is made of, in order. layers: without pool, reshapes and sizes."""

    source: fx.Node
    pool: fx.Node
    layers: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


def walk(network: Network, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Back from an operand along layers that nothing else reads, to the first value that is read more than once."""
    chain: list[fx.Node] = []
    readers = set(node.users) if len(node.users) == 1 else set()
    while set(node.users) <= readers:
        gate = find_gate(network, node)
        if gate is None and not in_chain(network, node):
            break
        chain.append(node)
        readers = {node, *(gate.nodes if gate is not None else ())}
        source = node.args[0] if gate is None else gate.source
        assert isinstance(source, fx.Node)
        node = source
    return node, chain[::-1]


def in_chain(network: Network, node: fx.Node) -> bool:
    """Whether a node is a linear layer or an activation, of one value."""
    if not node.args or not isinstance(node.args[0], fx.Node) or len(node.all_input_nodes) != 1:
        return False
    return is_linear(network, node) or isinstance(_activation(network, node), nn.Module)


def is_linear(network: Network, node: fx.Node) -> bool:
    return or_none(linear_layer, network, node) is not None


def _activation(network: Network, node: fx.Node) -> nn.Module | None:
    layer = network.layer(node)
    return layer if isinstance(layer, nn.Module) and rule_of(layer) is not None else None


def find_gate(network: Network, node: fx.Node) -> GateNodes | None:
    """The gate whose multiplication this node is, whichever factor comes first; None where it is none that can be followed."""
    if node.target not in MULTIPLICATIONS or len(node.args) != 2 or len(node.all_input_nodes) != 2:
        return None
    first, second = node.all_input_nodes
    return _gate(network, node, first, second) or _gate(network, node, second, first)


def _gate(network: Network, node: fx.Node, source: fx.Node, factor: fx.Node) -> GateNodes | None:
    shape, own = shape_of(node) or (), shape_of(factor) or ()
    if len(shape) != 4 or shape_of(source) != shape or len(own) != 4 or own[:2] != shape[:2]:
        return None
    layers: list[fx.Node] = []
    nodes: list[fx.Node] = []
    current = factor
    while len(current.users) == 1 and current.args and isinstance(current.args[0], fx.Node):
        nodes.append(current)
        pool = network.layer(current)
        if isinstance(pool, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) and spatial(current) == (1, 1):
            nodes += _sizes(source, nodes)
            found = GateNodes(source, current, tuple(layers[::-1]), tuple(sorted(nodes)))
            return found if current.args[0] is source else None
        if in_chain(network, current):
            layers.append(current)
        elif not _is_reshape(network, current):
            return None
        current = current.args[0]
    return None


def _is_reshape(network: Network, node: fx.Node) -> bool:
    """Whether one number a channel stays that, in another shape: (N, C), (N, C, 1, 1), or repeated over a map."""
    source = node.args[0]
    before, after = (shape_of(source) or () if isinstance(source, fx.Node) else ()), shape_of(node) or ()
    if len(before) < 2 or before[:2] != after[:2] or any(size != 1 for size in before[2:]):
        return False
    index = node.args[1] if node.target is operator.getitem else None
    whole = isinstance(index, tuple) and all(part in (None, slice(None)) for part in index)  # y[:, :, None, None]
    reshapes = node.target in _RESHAPES or isinstance(network.layer(node), nn.Flatten) or whole
    return node.target in _EXPANDS or (reshapes and all(size == 1 for size in after[2:]))


def _sizes(source: fx.Node, readers: list[fx.Node]) -> list[fx.Node]:
    """What these nodes, and nothing else, read of the source's shape."""
    every = [user for user in source.users if is_size(user)]
    for node in every:
        every += [user for user in node.users if is_size(user) and user not in every]
    found: list[fx.Node] = []
    for node in sorted(every, reverse=True):
        if set(node.users) <= {*readers, *found}:
            found.append(node)
    return found


def layers_of(network: Network, nodes: list[fx.Node]) -> tuple[list[ChainLayer], bool]:
    """The chain as convolutions with at most one activation and one gate after each; whether it ends in a bare convolution."""
    layers: list[ChainLayer] = []
    open_layer = False  # the last layer may still take an activation
    for node in nodes:
        gate, activation = find_gate(network, node), _activation(network, node)
        source = node.args[0] if gate is None else gate.source
        assert isinstance(source, fx.Node)
        if gate is not None:
            if not layers or layers[-1].gate is not None:
                layers.append(identity_layer(source, f"{node.name}_in"))
            pool = network.layer(gate.pool)
            assert isinstance(pool, nn.Module)
            inner = tuple(layers_of(network, list(gate.layers))[0])
            layers[-1] = replace(layers[-1], gate=Gate(pool, str(gate.pool.target), inner))
            open_layer = False
            continue
        if activation is not None:
            if not open_layer:
                layers.append(identity_layer(source, f"{node.target}_in"))
            layers[-1] = replace(layers[-1], activation=activation, activation_name=str(node.target))
            open_layer = False
            continue
        conv = linear_layer(network, node)
        if is_batch_norm(network.layer(node)) and open_layer and layers[-1].conv.norm is None:
            assert conv.norm is not None
            normed = with_norm(layers[-1].conv, conv.norm, conv.norm_name)
            layers[-1] = replace(layers[-1], conv=normed, range=range_of(node), seen=node.meta.get("seen"))
            continue
        if is_batch_norm(network.layer(node)):
            conv = dense(replace(conv, name=f"{conv.name}_in"))
        layers.append(
            ChainLayer(conv, None, "", spatial(source), spatial(node), range_of(node), node.meta.get("seen"))
        )
        open_layer = True
    return layers, open_layer


def identity_layer(source: fx.Node, name: str) -> ChainLayer:
    """A 1x1 convolution that changes nothing, after `source`."""
    shape = shape_of(source)
    assert shape is not None
    size = spatial(source)
    return ChainLayer(identity(shape[1], name), None, "", size, size, range_of(source), source.meta.get("seen"))
