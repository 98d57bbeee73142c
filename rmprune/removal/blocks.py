"""Finds residual additions by structure: fork, branch, shortcut, or why an addition is none that can go. Changes nothing."""

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

from torch import fx, nn

from rmprune.graph.calls import ADDITIONS, CONCATENATIONS, MULTIPLICATIONS, is_addition, is_sum, module_around
from rmprune.graph.convolution import Conv, Pair, with_norm
from rmprune.graph.network import Network, in_words, is_batch_norm, linear_layer, shape_of, spatial
from rmprune.graph.obstacle import Obstacle
from rmprune.graph.ranges import Range, range_of, size_seen
from rmprune.removal.chain import ChainLayer, find_detour, identity_layer, in_chain, is_linear, layers_of, walk
from rmprune.removal.copies import Entries, entries_of


@dataclass(frozen=True)
class ShortcutStage:
    """One linear stage of the shortcut, the range of what it emits, and how large the examples showed it."""

    conv: Conv
    size: Pair
    range: Range
    seen: float = math.inf

    @cached_property
    def folded(self) -> Conv:
        """The stage without norm, its kernel built once."""
        conv = self.conv.folded()
        weight = conv.weight()
        return replace(conv, weight=lambda: weight)

    @cached_property
    def entries(self) -> Entries:
        """The non-zero entries of its kernel, batch norm folded in."""
        return entries_of(self.folded)


@dataclass(frozen=True)
class Block:
    """y = f(x) + s(x): x is `fork`, f the branch, s the shortcut."""

    name: str
    add: fx.Node
    fork: fx.Node
    layers: tuple[ChainLayer, ...]
    stages: tuple[ShortcutStage, ...]
    branch: tuple[fx.Node, ...]  # the nodes that `layers` were made of, in order
    way: tuple[fx.Node, ...]  # the same of `stages`

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes of branch and shortcut, which go with the block."""
        return (*self.branch, *self.way)

    @property
    def shortcut(self) -> str:
        """The shortcut in words: "identity", or its layers."""
        return " + ".join(_describe(stage.conv) for stage in self.stages) or "identity"


def _describe(conv: Conv) -> str:
    kernel, stride = conv.geometry.kernel, conv.geometry.stride
    kind = "scale" if conv.groups == conv.in_channels and kernel == (1, 1) and conv.groups > 1 else "conv"
    if conv.groups == conv.in_channels and kernel != (1, 1):
        kind = "pool" if conv.norm is None else "depthwise"
    step = f"/{stride[0]}" if stride != (1, 1) else ""
    return f"{kind} {kernel[0]}x{kernel[1]}{step}"


def additions(network: Network) -> list[tuple[str, fx.Node]]:
    """Every addition of two maps, in topological order, with the name of the module it stands in.

    In a flat graph, such as a loaded artifact's, that is what the names of the layers before it have in common.
    """
    adding = [node for node in network.graph.nodes if is_addition(node) and _adds_maps(node)]
    found = [(module_around(node)[0] or _common_name(network, node), node) for node in adding]
    names = [name for name, _ in found]
    numbered, seen = [], dict.fromkeys(names, 0)
    for name, node in found:
        seen[name] += 1
        numbered.append((f"{name}#{seen[name]}" if names.count(name) > 1 else name, node))
    return numbered


def _common_name(network: Network, add: fx.Node) -> str:
    """layer1_0_conv1, layer1_0_bn1, layer1_0_conv2 -> layer1_0; "add" where the names share nothing."""
    ways = [walk(network, operand)[1] for operand in add.args[:2] if isinstance(operand, fx.Node)]
    targets = [str(node.target) for way in ways for node in way if node.op == "call_module"]
    words = zip(*(re.split(r"[._]", target) for target in targets), strict=False)
    shared = [each[0] for each in takewhile(lambda each: len(set(each)) == 1, words)]
    return targets[0][: len("_".join(shared))] if shared else "add"


def _adds_maps(node: fx.Node) -> bool:
    operands = node.args[:2]
    return len(operands) == 2 and all(
        isinstance(a, fx.Node) and a.op != "get_attr" and shape_of(a) is not None for a in operands
    )  # fmt: skip


def find_block(network: Network, name: str, add: fx.Node) -> Block:
    """The residual block that ends in this addition. Raises Obstacle where it ends none that can be handled."""
    first, second = add.args[0], add.args[1]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    if len(add.args) > 2 or add.kwargs.get("alpha", 1) != 1:
        raise Obstacle("the addition scales its second operand (alpha)")
    if first is second:
        raise Obstacle("adds a value to itself: no residual")
    if shape_of(first) != shape_of(second) or len(shape_of(first) or ()) != 4:
        raise Obstacle(
            f"adds shapes {shape_of(first)} and {shape_of(second)}, not two equal maps (batch, channels, height, width)"
        )
    (source, chain), (other_source, other) = walk(network, first), walk(network, second)
    if source is not other_source:
        raise Obstacle(why_no_fork(network, max(source, other_source)))
    linear = [all(is_linear(network, node) for node in nodes) for nodes in (chain, other)]
    if not any(linear):
        raise Obstacle("both ways hold an activation or another non-linear layer: neither is a shortcut")
    swap = _reach(network, chain) < _reach(network, other) if all(linear) else linear[0]
    branch, shortcut = (other, chain) if swap else (chain, other)
    layers, stages = _layers(network, branch), _stages(network, shortcut)
    nodes = _with_detours(network, branch)
    return Block(name, add, source, tuple(layers), tuple(stages), nodes, tuple(shortcut))


def _reach(network: Network, nodes: list[fx.Node]) -> tuple[int, int, int]:
    """Of two linear ways, the branch is the one with more layers, then the larger kernel, then more norms."""
    convs = [linear_layer(network, node) for node in nodes if not is_batch_norm(network.layer(node))]
    return len(convs), max((c.geometry.kernel[0] * c.geometry.kernel[1] for c in convs), default=0), len(nodes)


def _layers(network: Network, nodes: list[fx.Node]) -> list[ChainLayer]:
    """The branch as layers, a convolution first and last."""
    layers, open_layer = layers_of(network, nodes)
    if not open_layer:
        layers.append(identity_layer(nodes[-1], f"{nodes[-1].name}_out"))
    return layers


def _with_detours(network: Network, nodes: list[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes of a chain and of the detours over it, in order."""
    detours = [find_detour(network, node) for node in nodes]
    return tuple(sorted({*nodes, *(inner for detour in detours if detour is not None for inner in detour.nodes)}))


def _stages(network: Network, nodes: list[fx.Node]) -> list[ShortcutStage]:
    stages: list[ShortcutStage] = []
    for node in nodes:
        conv = linear_layer(network, node)
        if is_batch_norm(network.layer(node)) and stages and stages[-1].conv.norm is None:
            assert conv.norm is not None
            stages[-1] = replace(
                stages[-1], conv=with_norm(stages[-1].conv, conv.norm, conv.norm_name), range=range_of(node), seen=size_seen(node)
            )  # fmt: skip
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        stages.append(ShortcutStage(conv, spatial(source), range_of(node), size_seen(node)))
    return stages


def _is_weight(node: fx.Node) -> bool:
    """Whether a node is made of weights alone, whatever the input."""
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(map(_is_weight, node.all_input_nodes)))


def _holds_layer_norm(network: Network, node: fx.Node) -> bool:
    """Whether a LayerNorm lies on the way back from here to the first value that is read more than once."""
    while len(node.users) == 1:
        if isinstance(network.layer(node), nn.LayerNorm) or node.target is nn.functional.layer_norm:
            return True
        sources = [source for source in node.all_input_nodes if not _is_weight(source)]
        if len(sources) != 1:
            return False
        node = sources[0]
    return False


def why_no_fork(network: Network, end: fx.Node) -> str:
    """Names what ends the walk back from an addition before branch and shortcut meet."""
    if _holds_layer_norm(network, end):
        return (
            "its branch holds a LayerNorm, whose mean and variance are over all channels: copies among them would change the others, "
            "and come out bounded, as no multiple of themselves; beside it they take a concatenation of what the addition adds, "
            "so nothing is gained"
        )
    if end.target in MULTIPLICATIONS and any(_is_weight(source) for source in end.all_input_nodes):
        return "its branch is scaled by weights computed on the way, which no kernel stands for"
    if end.target in MULTIPLICATIONS:
        return (
            "its branch is multiplied by a value that is computed on the way and is no gate that can be followed: one number a "
            "channel, of a pool of the very map that it multiplies (AdaptiveAvgPool2d(1), mean((2, 3))), by convolutions, linear "
            "layers and activations"
        )
    if is_sum(end) and any(_is_weight(source) for source in end.all_input_nodes):
        return (
            "its branch or shortcut adds weights of other sizes than one number a channel, which no kernel stands for"
        )
    if end.target in ADDITIONS:
        return "its branch holds another residual that stays"
    if end.target in CONCATENATIONS:
        return "its branch concatenates several ways: it is no chain of layers"
    if len(end.users) > 1 and in_chain(network, end):
        return f"the output of {in_words(network, end)} inside its branch is read elsewhere, too: the branch is no chain of layers"
    if end.op == "placeholder":
        return "its two ways start from different values: it adds maps of two sources"
    if isinstance(network.layer(end), nn.Module):
        try:
            linear_layer(network, end)
        except Obstacle as obstacle:
            return f"its branch or shortcut holds a layer that no kernel stands for: {obstacle}"
    return (
        f"its branch or shortcut holds {in_words(network, end)}, which is no layer of a kind that can be followed: no chain of "
        "layers leads back to the fork"
    )
