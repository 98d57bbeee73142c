"""A way through the graph as a chain of layers: convolutions, activations, gates and tails over them. Changes nothing."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from rmprune.graph.activations import rule_of
from rmprune.graph.calls import MULTIPLICATIONS, is_size
from rmprune.graph.convolution import Conv, Pair, dense, identity, with_norm
from rmprune.graph.network import Network, is_batch_norm, joined_maps, linear_layer, shape_of, spatial
from rmprune.graph.obstacle import or_none
from rmprune.graph.ranges import Range, range_of

_RESHAPES = ("view", "reshape", "flatten", "unsqueeze", "squeeze", torch.flatten, torch.reshape, torch.unsqueeze)
_EXPANDS = ("expand", "expand_as")


@dataclass(frozen=True)
class ChainLayer:
    """One convolution of the branch, the activation after it, the gate that multiplies what comes out (RM.md 3), and a tail.

    A tail is layers that what came out goes through once more, to stand behind itself: cat(y, tail(y)), as in GhostNet.
    """

    conv: Conv
    activation: nn.Module | None
    activation_name: str
    size: Pair  # of its input, in pixels
    out_size: Pair
    range: Range  # of what the convolution emits, before the activation
    seen: Range | None  # the same as the examples showed it
    split: int = 0  # activation and gate are applied to so many channels from the first on; 0: to all
    gate: Gate | None = None
    gate_first: bool = False  # the gate stands before the activation
    tail: tuple[ChainLayer, ...] = ()

    @property
    def stock(self) -> bool:
        """Whether it is one convolution and one activation, and no more."""
        return self.gate is None and not self.tail


@dataclass(frozen=True)
class Gate:
    """y * g(y), where g pools y to one number a channel and puts these through layers (squeeze-and-excitation)."""

    pool: nn.Module
    pool_name: str
    layers: tuple[ChainLayer, ...]


@dataclass(frozen=True)
class Detour:
    """The node y * g(y), where g starts with `pool`, or cat(y, g(y)), without: its y, and what g is made of, in order.

    layers: without pool, reshapes and sizes.
    """

    source: fx.Node
    pool: fx.Node | None
    layers: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


def walk(network: Network, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Back from an operand along layers that nothing else reads, to the first value that is read more than once."""
    chain: list[fx.Node] = []
    readers = set(node.users) if len(node.users) == 1 else set()
    while set(node.users) <= readers:
        detour = find_detour(network, node)
        if detour is None and not in_chain(network, node):
            break
        chain.append(node)
        readers = {node, *(detour.nodes if detour is not None else ())}
        source = node.args[0] if detour is None else detour.source
        assert isinstance(source, fx.Node)
        node = source
    return node, chain[::-1]


def in_chain(network: Network, node: fx.Node) -> bool:
    """Whether a node is a linear layer or an activation, of one value."""
    if not node.args or not isinstance(node.args[0], fx.Node) or len(node.all_input_nodes) != 1:
        return False
    return is_linear(network, node) or isinstance(_activation(network, node), nn.Module)


def is_linear(network: Network, node: fx.Node) -> bool:
    """Whether a node is a convolution, or another layer that a kernel stands for."""
    return or_none(linear_layer, network, node) is not None


def _activation(network: Network, node: fx.Node) -> nn.Module | None:
    layer = network.layer(node)
    return layer if isinstance(layer, nn.Module) and rule_of(layer) is not None else None


def find_detour(network: Network, node: fx.Node) -> Detour | None:
    """The gate whose multiplication this node is, or the tail whose concatenation; None where it is none that can be followed."""
    if len(node.all_input_nodes) != 2:
        return None
    first, second = node.all_input_nodes
    if node.target in MULTIPLICATIONS and len(node.args) == 2:
        return _gate(network, node, first, second) or _gate(network, node, second, first)
    return _tail(network, first, second) if joined_maps(node) == [first, second] else None


def _tail(network: Network, source: fx.Node, end: fx.Node) -> Detour | None:
    nodes: list[fx.Node] = []
    while end is not source:
        if len(end.users) != 1 or not in_chain(network, end):
            return None
        nodes.insert(0, end)
        assert isinstance(end.args[0], fx.Node)
        end = end.args[0]
    return Detour(source, None, tuple(nodes), tuple(nodes))


def _gate(network: Network, node: fx.Node, source: fx.Node, factor: fx.Node) -> Detour | None:
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
            found = Detour(source, current, tuple(layers[::-1]), tuple(sorted(nodes)))
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
    """The chain as convolutions with at most one activation, gate and tail after each; whether it ends in a bare convolution."""
    layers: list[ChainLayer] = []
    open_layer = False  # the last layer may still take an activation
    for node in nodes:
        detour, activation = find_detour(network, node), _activation(network, node)
        source = node.args[0] if detour is None else detour.source
        assert isinstance(source, fx.Node)
        if detour is not None:
            if not layers or layers[-1].tail or (detour.pool is not None and layers[-1].gate is not None):
                layers.append(identity_layer(source, f"{node.name}_in"))
            layers[-1] = _with_detour(network, layers[-1], detour)
            open_layer = False
            continue
        if activation is not None:
            gated = (
                bool(layers) and layers[-1].activation is None and layers[-1].gate is not None and not layers[-1].tail
            )
            if not open_layer and not gated:
                layers.append(identity_layer(source, f"{node.target}_in"))
            named = replace(layers[-1], activation=activation, activation_name=str(node.target))
            layers[-1] = replace(named, gate_first=gated)
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
        layers.append(ChainLayer(conv, None, "", spatial(source), spatial(node), range_of(node), node.meta.get("seen")))
        open_layer = True
    return layers, open_layer


def _with_detour(network: Network, layer: ChainLayer, detour: Detour) -> ChainLayer:
    inner = tuple(layers_of(network, list(detour.layers))[0])
    if detour.pool is None:
        return replace(layer, tail=inner)
    pool = network.layer(detour.pool)
    assert isinstance(pool, nn.Module)
    return replace(layer, gate=Gate(pool, str(detour.pool.target), inner))


def identity_layer(source: fx.Node, name: str) -> ChainLayer:
    """A 1x1 convolution that changes nothing, after `source`."""
    shape = shape_of(source)
    assert shape is not None
    size = spatial(source)
    return ChainLayer(identity(shape[1], name), None, "", size, size, range_of(source), source.meta.get("seen"))
