"""What code writes out, as layers: pieces as slices, zeros as padding, relu6(x + 3) / 6 as Hardsigmoid;
and calls that change no value, taken out."""

import operator
from typing import Any

import torch
from torch import fx, nn

from rmprune.graph.calls import (
    ADDITIONS,
    CHUNKS,
    MULTIPLICATIONS,
    argument,
    is_sum,
    own_size,
    piece_sizes,
)
from rmprune.graph.convolution import Scale
from rmprune.graph.network import Network, joined_maps, shape_of
from rmprune.graph.sums import as_sums

_TIMES_X: dict[object, type[nn.Module]] = {nn.Hardsigmoid: nn.Hardswish, nn.Sigmoid: nn.SiLU}


def as_layers(network: Network) -> None:
    """Rewrites all of these, in place; `propagate_shapes` has run."""
    _drop_idle(network)
    _slice_pieces(network)
    as_sums(network)
    _pad_zeros(network)
    _name_activations(network)


def _name_activations(network: Network) -> None:
    """Rewrites relu6(x + 3) / 6 as Hardsigmoid, x times that as Hardswish, and x * sigmoid(x) as SiLU, in place."""
    for node in list(network.graph.nodes):
        sixth = _sixth_of(network, node)
        source = _of_shifted_clip(network, sixth)
        if source is not None:
            _replace(network, node, source, nn.Hardsigmoid())
            continue
        for factor, other in _factors(sixth):  # x * relu6(x + 3) / 6
            if _of_shifted_clip(network, other) is factor:
                _replace(network, node, factor, nn.Hardswish())
                break
    for node in list(network.graph.nodes):
        for source, factor in _factors(node):
            found = _TIMES_X.get(type(network.layer(factor)))
            if found is not None and factor.args[0] is source:
                _replace(network, node, source, found())
                break
    network.drop_unread()


def _factors(node: fx.Node | None) -> list[tuple[fx.Node, fx.Node]]:
    """The two factors of a product, in either order."""
    factors = node.all_input_nodes if node is not None and node.target in MULTIPLICATIONS else []
    return [(factors[0], factors[1]), (factors[1], factors[0])] if len(factors) == 2 else []


def _sixth_of(network: Network, node: fx.Node) -> fx.Node | None:
    """x, where the node is x / 6."""
    layer = network.layer(node)
    sixth = isinstance(layer, Scale) and layer.factor.numel() == 1 and float(layer.factor) == 1 / 6
    source = node.args[0] if sixth else None
    return source if isinstance(source, fx.Node) else None


def _of_shifted_clip(network: Network, node: fx.Node | None) -> fx.Node | None:
    """x, where the node is relu6(x + 3)."""
    clip = None if node is None else network.layer(node)
    if not isinstance(clip, nn.Hardtanh) or (clip.min_val, clip.max_val) != (0, 6):  # a ReLU6 is one
        return None
    assert node is not None
    plus = node.args[0]
    if not isinstance(plus, fx.Node) or plus.target not in ADDITIONS or plus.kwargs or 3 not in plus.args:
        return None
    return plus.all_input_nodes[0]


def _replace(network: Network, node: fx.Node, source: fx.Node, module: nn.Module) -> None:
    new = network.insert(node, f"{node.name}_{type(module).__name__.lower()}", module, source)
    new.meta = dict(node.meta)
    network.bypass(node, new)


_CASTS = ("contiguous", "to", "float", "double", "type", "type_as", "cpu", "cuda")
_RESHAPES = ("view", "reshape", "expand")
_LIKE = ("view_as", "reshape_as", "expand_as")


def _drop_idle(network: Network) -> None:
    """Takes out what gives its input back as it is: casts (all is float64 here), views of the same sizes, x[:], padding by nothing."""
    for node in reversed(list(network.graph.nodes)):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or shape_of(node) is None or shape_of(source) != shape_of(node):
            continue
        if (
            node.target in _CASTS
        ):  # layers may be of the format cast to, and what reads memory as it lies, such as view, of that order
            layers = node.target == "contiguous"
            idle = node.meta["floating"] and all(
                is_sum(each) or (layers and each.op == "call_module") for each in node.users
            )
        elif node.target in _RESHAPES:
            idle = _own_sizes(node, source)
        elif node.target in _LIKE:
            idle = True
        elif node.target is operator.getitem:
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            idle = all(part is Ellipsis or part == slice(None) for part in index)
        else:
            idle = node.target is nn.functional.pad and not any(argument(node, 1, "pad", default=(1,)))
        if idle:
            network.bypass(node, source)
    network.drop_unread()


def _own_sizes(node: fx.Node, source: fx.Node) -> bool:
    """Whether a view has the sizes of what it views, whatever they are: x.view(x.shape), x.view(x.size(0), 8, x.size(2), -1)."""
    sizes = node.args[1:] if node.args[1:] else tuple(node.kwargs.values())
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    if len(sizes) == 1:
        return own_size(sizes[0]) == (source, None)
    return list(sizes).count(-1) < 2 and all(
        size == -1 or own_size(size) == (source, place) or (place == 1 and isinstance(size, int))
        for place, size in enumerate(sizes)
    )


def _pad_zeros(network: Network) -> None:
    """Rewrites cat([x, zeros], 1), the CIFAR shortcut without weights (RM.md 3), as channels padded to x, in place."""
    for node in list(network.graph.nodes):
        parts = joined_maps(node)
        filled = [i for i, part in enumerate(parts) if not _is_zero(network, part)]
        if len(filled) != 1 or len(parts) < 2:
            continue
        counts, at = [(shape_of(part) or (0, 0))[1] for part in parts], filled[0]
        padding = (0, 0, 0, 0, sum(counts[:at]), sum(counts[at + 1 :]))
        with network.graph.inserting_before(node):
            padded = network.graph.call_function(nn.functional.pad, (parts[at], padding))
        padded.meta = dict(node.meta)
        network.bypass(node, padded)
        network.drop_unread()


def _is_zero(network: Network, node: fx.Node) -> bool:
    """Whether a node is zeros, whatever the input: torch.zeros_like(x), x.new_zeros(...), 0 * x, a buffer of zeros."""
    if node.target in (torch.zeros_like, torch.zeros, "new_zeros"):
        return True
    layer, constant = network.layer(node), network.constants.get(str(node.target)) if node.op == "get_attr" else None
    zeros = layer.factor if isinstance(layer, Scale) else constant
    return zeros is not None and not bool(zeros.any())


def _slice_pieces(network: Network) -> None:
    """Rewrites each piece of a split as x[:, a:b], and x[:, :n] that takes all as x, in place; `propagate_shapes` has run."""
    for node in list(network.graph.nodes):
        index = node.args[1] if node.target is operator.getitem else None
        if isinstance(index, tuple) and isinstance(node.args[0], fx.Node) and _takes_all(node.args[0], node, index):
            network.bypass(node, node.args[0])
        if not isinstance(index, int) or not isinstance(node.args[0], fx.Node):
            continue
        ends = _ends(node.args[0])
        if ends is not None and -len(ends) < index < len(ends):
            index %= len(ends)
            node.args = (node.args[0].args[0], (slice(None), slice(ends[index - 1] if index else 0, ends[index])))
    network.drop_unread()


def _takes_all(source: fx.Node, node: fx.Node, index: tuple[Any, ...]) -> bool:
    """Whether x[:, :n] takes all that there is, as GhostNet's does."""
    channels = len(index) > 1 and isinstance(index[1], slice) and index[1].step in (None, 1)
    rest = all(part == slice(None) for part in (*index[:1], *index[2:]))  # a crop may take all at this size alone
    return channels and rest and shape_of(node) is not None and shape_of(source) == shape_of(node)


def _ends(node: fx.Node) -> list[int] | None:
    """The channel after the last of each piece; None where the node is no cut of a map along its channels."""
    sizes, source = piece_sizes(node), node.args[0] if node.args else None
    shape = shape_of(source) if isinstance(source, fx.Node) else None
    if sizes is None or shape is None or len(shape) != 4 or argument(node, 2, "dim", default=0) not in (1, -3):
        return None
    channels = shape[1]
    if isinstance(sizes, list | tuple):
        if not all(isinstance(size, int) for size in sizes):
            return None
        return [sum(sizes[: i + 1]) for i in range(len(sizes))]
    if not isinstance(sizes, int) or sizes < 1:
        return None
    size = -(-channels // sizes) if node.target in CHUNKS else sizes
    return [min(end, channels) for end in range(size, channels + size, size)]
