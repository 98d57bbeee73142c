"""Sums of maps however code writes them: as additions of two, whose operands are scaled by layers. Activations are written_out's."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.graph.calls import argument, is_addition, is_sum
from rmprune.graph.convolution import Scale, Shift
from rmprune.graph.network import Network, shape_of

_LERP, _ADDCMUL, _ADDCDIV = (
    (torch.lerp, "lerp", "lerp_"),
    (torch.addcmul, "addcmul", "addcmul_"),
    (torch.addcdiv, "addcdiv", "addcdiv_"),
)


def spell_out(graph: fx.Graph) -> None:
    """Rewrites lerp(x, y, w) as x * (1 - w) + y * w, addcmul(x, a, b, value=v) as x + a * b * v and addcdiv as x + a / b * v, in place."""
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            total = _spelt_out(graph, node)
        if total is not None:
            total.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)


def _spelt_out(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    x, names = argument(node, 0, "input"), ("end", "weight") if node.target in _LERP else ("tensor1", "tensor2")
    a, b = (argument(node, place, name) for place, name in enumerate(names, 1))
    value = node.kwargs.get("value", 1)
    if node.target not in (*_LERP, *_ADDCMUL, *_ADDCDIV) or len(node.args) > 3:
        return None
    if node.target in _LERP:
        rest = graph.call_function(torch.rsub, (b, 1)) if isinstance(b, fx.Node) else 1 - b
        x = graph.call_function(operator.mul, (x, rest))
    product = graph.call_function(operator.truediv if node.target in _ADDCDIV else operator.mul, (a, b))
    if value != 1:
        product = graph.call_function(operator.mul, (product, value))
    return graph.call_function(operator.add, (x, product))


def as_sums(network: Network) -> None:
    """x - a * y as x + (-a) * y, the sum of a stack as a sum, and one number a channel that is added as a layer;
    `propagate_shapes` has run."""
    for node in list(network.graph.nodes):
        _unstack(network, node)
        if is_sum(node):
            _add_up(network, node)


def _add_up(network: Network, node: fx.Node) -> None:
    """Rewrites a sum or difference as an addition of a map and another, scaled, or a number; of a tensor with one a channel, as a layer."""
    shape, alpha = shape_of(node) or (), node.kwargs.get("alpha", 1)
    parts = [argument(node, 0, "input"), argument(node, 1, "other")]
    known = len(node.args) <= 2 and not node.kwargs.keys() - {"input", "other", "alpha"}
    if not known or len(shape) != 4 or not isinstance(alpha, int | float):
        return
    factors = [1, alpha if is_addition(node) else -alpha]
    terms = list(zip(parts[::-1] if node.target is torch.rsub else parts, factors, strict=True))
    maps = [term for term in terms if _is_map(term[0], shape)]
    others = [(part, factor) for part, factor in terms if not _is_map(part, shape)]
    added = [_numbers(network, part, shape[1], factor) for part, factor in others]
    if not maps or any(number is None for number in added):
        return
    scaled = [part if factor == 1 else _scaled(network, node, part, factor) for part, factor in maps]
    if added and isinstance(added[0], Tensor):
        node.op, node.target, node.args = "call_module", network.add(node.name, Shift(added[0])), tuple(scaled)
    else:
        node.op, node.target, node.args = "call_function", operator.add, (*scaled, *added)
    node.kwargs = {}


def _is_map(part: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(part, fx.Node) and part.op != "get_attr" and shape_of(part) == shape


def _numbers(network: Network, part: Any, channels: int, factor: float) -> float | Tensor | None:
    """A number, or a tensor of the network with one for each channel, times `factor`; None for anything else."""
    if isinstance(part, int | float):
        return part * factor
    constant = network.constants.get(str(part.target)) if isinstance(part, fx.Node) and part.op == "get_attr" else None
    if constant is None or constant.dim() > 4:
        return None
    fits = constant.numel() == 1 or (constant.numel() == channels and constant.shape[-3:] == (channels, 1, 1))
    scaled = constant * factor if fits else None
    if scaled is not None and isinstance(constant, nn.Parameter):  # goes on being trained
        return nn.Parameter(scaled, requires_grad=constant.requires_grad)
    return scaled


def _scaled(network: Network, node: fx.Node, part: fx.Node, factor: float) -> fx.Node:
    scale = Scale(torch.tensor([factor], dtype=torch.float64))
    scaled = network.insert(node, f"{node.name}_scaled", scale, part)
    scaled.meta["shape"] = shape_of(part)
    return scaled


def _unstack(network: Network, node: fx.Node) -> None:
    """Rewrites the sum or mean of a stack over what was stacked, torch.stack([x, y]).sum(0), as sums of two, in place."""
    stack = argument(node, 0, "input")
    if node.target not in _SUMS_OVER or not isinstance(stack, fx.Node) or stack.target is not torch.stack:
        return
    parts, at = argument(stack, 0, "tensors"), argument(stack, 1, "dim", default=0)
    over, rank = argument(node, 1, "dim"), len(shape_of(stack) or ())
    over = over[0] if isinstance(over, list | tuple) and len(over) == 1 else over
    if not isinstance(parts, list | tuple) or not isinstance(over, int) or over % rank != at % rank:
        return
    kept, named = argument(node, 2, "keepdim", default=False), {"dim", "keepdim"}
    if kept or len(node.args) > 3 or node.kwargs.keys() - named or len(parts) < 2:
        return
    total = parts[0]
    for part in parts[1:]:
        with network.graph.inserting_before(node):
            total = network.graph.call_function(operator.add, (total, part))
        total.meta = dict(node.meta)
    if node.target in ("mean", torch.mean):
        total = _scaled(network, node, total, 1 / len(parts))
    network.bypass(node, total)


_SUMS_OVER = ("sum", torch.sum, "mean", torch.mean)
