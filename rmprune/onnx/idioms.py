"""What exporters write out in several operators as one layer of torch: a bias added by itself, GELU by erf. Nothing else."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

_BIASED = (_ConvNd, nn.Linear)


def join_idioms(model: fx.GraphModule) -> None:
    """Rewrites both in the graph, in place."""
    for node in list(model.graph.nodes):
        if node.target is operator.add:
            _join_bias(model, node)
        elif node.target is operator.mul:
            _name_gelu(model, node)


def _join_bias(model: fx.GraphModule, node: fx.Node) -> None:
    """conv(x) + b, one number a channel, becomes the convolution's bias."""
    source, added = node.args
    if not isinstance(source, fx.Node) or not isinstance(added, fx.Node) or added.op != "get_attr":
        return
    layer = model.get_submodule(str(source.target)) if source.op == "call_module" else None
    if not isinstance(layer, _BIASED) or layer.bias is not None or len(source.users) != 1:
        return
    value, rank = getattr(model, str(added.target)), len(source.meta["seen"][0].shape)
    axis = rank - 1 if isinstance(layer, nn.Linear) else 1
    channels = source.meta["seen"][0].shape[axis]
    wanted = [channels if i == axis else 1 for i in range(rank)]
    if [1] * (rank - value.dim()) + list(value.shape) == wanted:
        layer.bias = nn.Parameter(value.detach().clone().flatten())
        node.replace_all_uses_with(source)
        model.graph.erase_node(node)


def _name_gelu(model: fx.GraphModule, node: fx.Node) -> None:
    """x * (erf(x / sqrt(2)) + 1) * 0.5, as torch's exporter writes it."""
    product, half = node.args
    if half != 0.5 or not isinstance(product, fx.Node) or product.target is not operator.mul:
        return
    for x, plus in (product.args, product.args[::-1]):
        if not isinstance(plus, fx.Node) or plus.target is not operator.add or plus.args[1] != 1:
            continue
        erf = plus.args[0]
        inner = erf.args[0] if isinstance(erf, fx.Node) and erf.target is torch.erf else None
        if isinstance(inner, fx.Node) and inner.target is operator.truediv and inner.args[0] is x:
            root = inner.args[1]
            if isinstance(root, float) and math.isclose(root, math.sqrt(2), rel_tol=1e-6):
                model.add_module(f"{node.name}_gelu", nn.GELU())
                with model.graph.inserting_before(node):
                    named = model.graph.call_module(f"{node.name}_gelu", (x,))
                named.meta["seen"] = node.meta["seen"]
                node.replace_all_uses_with(named)
                model.graph.erase_node(node)
                return
