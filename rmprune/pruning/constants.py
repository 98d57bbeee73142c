"""Which channels are constant, whatever the input: propagated through a torch.fx graph in eval mode.

Finds only; `dead.py` removes.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmprune.pruning.chain import BATCH_NORMS, is_channelwise, is_flatten, is_global_mean, trace_graph

POOLS = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Constants:
    """``inputs``: {Conv2d or Linear: [c_in] float64, the constant of each input channel, NaN where it is none}.
    ``followers``: {such a layer: the batch norm that alone reads its output}."""

    inputs: Mapping[str, Tensor]
    followers: Mapping[str, str]


def find_constants(model: nn.Module) -> Constants | None:
    """Constants of every layer's input; None where torch.fx cannot follow the model."""
    graph = trace_graph(model)
    if graph is None:
        return None
    values: dict[fx.Node, Tensor | None] = {}
    inputs: dict[str, Tensor] = {}
    with torch.no_grad():
        for node in graph.nodes:
            values[node] = _propagate(node, model, values, inputs)
    return Constants(inputs, _followers(graph, model))


def is_padded(conv: nn.Module) -> bool:
    """Whether border positions see zeros instead of the channel (other padding modes repeat a constant)."""
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        return False
    if isinstance(conv.padding, str):
        return conv.padding == "same" and any(k > 1 for k in conv.kernel_size)
    return any(p != 0 for p in conv.padding)


def response(layer: nn.Module, values: Tensor) -> Tensor:
    """[c_out]: what the layer adds to its outputs for constant inputs ``values`` [c_in], away from the border; no
    bias.
    """
    if isinstance(layer, nn.Conv2d):
        taps = layer.weight.detach().double().sum(dim=(2, 3), keepdim=True)
        return F.conv2d(values.double().to(taps.device)[None, :, None, None], taps, groups=layer.groups).flatten()
    assert isinstance(layer, nn.Linear)
    return layer.weight.double() @ values.double().to(layer.weight.device)


def _propagate(
    node: fx.Node, model: nn.Module, values: Mapping[fx.Node, Tensor | None], inputs: dict[str, Tensor]
) -> Tensor | None:
    """[channels] float64 with NaN for "not constant", or None where nothing is known."""
    if node.op in ("placeholder", "get_attr", "output") or not node.all_input_nodes:
        return None
    if node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add) and not node.kwargs:
        a, b = (values[x] if isinstance(x, fx.Node) else x for x in node.args)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a + b if a.shape == b.shape else None
        pair = (a, b) if isinstance(a, Tensor) else (b, a)
        return pair[0] + pair[1] if isinstance(pair[0], Tensor) and isinstance(pair[1], int | float) else None
    if node.op == "call_function" and node.target is torch.cat:
        parts = [values[a] for a in node.all_input_nodes]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        known = [p for p in parts if p is not None]
        inputs_once = isinstance(node.args[0], list | tuple) and len(node.args[0]) == len(parts)
        return torch.cat(known) if dim == 1 and inputs_once and len(known) == len(parts) else None
    if len(node.all_input_nodes) != 1:
        return None
    before = values[node.all_input_nodes[0]]
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Conv2d | nn.Linear):
        return _through_layer(str(node.target), module, before, inputs)
    if isinstance(module, BATCH_NORMS):
        return _through_batch_norm(module, before)
    if before is None:
        return None
    if is_flatten(node, model) or isinstance(module, POOLS) or _is_pool(node):
        return before
    if isinstance(module, nn.AvgPool2d):
        padded = any(p != 0 for p in torch.nn.modules.utils._pair(module.padding)) and module.count_include_pad
        return torch.where(before == 0, before, torch.nan) if padded else before
    if isinstance(module, nn.PReLU):
        return torch.where(before > 0, before, module.weight.double().cpu() * before)
    if is_channelwise(node, model):
        return _through_function(node, module, before)
    return None


def _is_pool(node: fx.Node) -> bool:
    return is_global_mean(node) or node.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.max_pool2d)


def _through_layer(name: str, layer: nn.Conv2d | nn.Linear, before: Tensor | None, inputs: dict[str, Tensor]) -> Tensor:
    size = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    if before is None or size % len(before):
        before = torch.full((size,), torch.nan, dtype=torch.float64)
    before = before.repeat_interleave(size // len(before))  # flattened: a run of H*W features a channel
    inputs[name] = before
    varies = before.isnan() | ((before != 0) & is_padded(layer))
    weight = layer.weight.detach().abs()
    if isinstance(layer, nn.Conv2d):
        reach = F.conv2d(varies.to(weight)[None, :, None, None], weight.sum((2, 3), keepdim=True), groups=layer.groups)
        touched = reach.flatten() != 0
    else:
        touched = weight @ varies.to(weight) != 0
    out = response(layer, torch.where(varies, 0.0, before)).cpu()
    if layer.bias is not None:
        out = out + layer.bias.detach().double().cpu()
    return torch.where(touched.cpu(), torch.nan, out)


def _through_batch_norm(bn: nn.BatchNorm1d | nn.BatchNorm2d, before: Tensor | None) -> Tensor:
    size = bn.num_features
    before = torch.full((size,), torch.nan, dtype=torch.float64) if before is None or len(before) != size else before
    scale = torch.ones(size, dtype=torch.float64) if bn.weight is None else bn.weight.detach().double().cpu()
    shift = torch.zeros(size, dtype=torch.float64) if bn.bias is None else bn.bias.detach().double().cpu()
    if bn.running_mean is None or bn.running_var is None:
        return torch.where(scale == 0, shift, torch.nan)
    mean, var = bn.running_mean.double().cpu(), bn.running_var.double().cpu()
    return torch.where(scale == 0, shift, (before - mean) / (var + bn.eps).sqrt() * scale + shift)


def _through_function(node: fx.Node, module: nn.Module | None, before: Tensor) -> Tensor | None:
    """Apply an elementwise node to the constants; NaN is kept by mask, for not every function passes it on."""
    known = torch.where(before.isnan(), 0.0, before)[None, :, None, None]
    if isinstance(module, nn.Dropout | nn.Dropout2d) or node.target in (F.dropout, "contiguous"):
        return before
    if module is not None:
        after = module(known.clone())
    elif node.op == "call_method":
        after = getattr(known.clone(), str(node.target))(*node.args[1:], **node.kwargs)
    elif callable(node.target) and node.target is not F.avg_pool2d:
        arguments = [known.clone() if isinstance(a, fx.Node) else a for a in node.args]
        after = node.target(*arguments, **node.kwargs)
    else:
        return None
    return torch.where(before.isnan(), before, after.flatten())


def _followers(graph: fx.Graph, model: nn.Module) -> dict[str, str]:
    found = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(model.get_submodule(str(node.target)), nn.Conv2d | nn.Linear):
            continue
        users = list(node.users)
        if len(users) == 1 and users[0].op == "call_module":
            follower = model.get_submodule(str(users[0].target))
            if isinstance(follower, BATCH_NORMS) and follower.running_mean is not None:
                found[str(node.target)] = str(users[0].target)
    return found
