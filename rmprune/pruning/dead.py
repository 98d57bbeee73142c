"""Exact removal of channels that compute nothing (RM.md 6): constants are folded into readers, unread ones just go."""

import copy
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmprune.errors import NotEquivalent, UnsupportedModel
from rmprune.pruning.budget import Budget, allowed_units
from rmprune.pruning.find_groups import (
    BATCH_NORMS,
    find_structure,
    is_channelwise,
    is_flatten,
    is_global_mean,
    trace_graph,
)
from rmprune.pruning.groups import Group, Keep, Structure, input_weights, outputs, weight_of
from rmprune.pruning.surgery import shrink

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Folded:
    """``model`` without its dead channels; ``keep``: which units of the original structure it still has;
    ``structure``: of ``model``.
    """

    model: nn.Module
    keep: Keep
    structure: Structure


def fold_dead_channels(
    model: M, example_inputs: Tensor, *, limits: Budget | None = None, structure: Structure | None = None
) -> M:
    """A new network, equal in eval mode, without channels that are constant or that nobody reads, to a fixpoint.

    A constant c (batch-norm scale 0, or computed from constants alone) goes into its reader's batch norm or bias:
    ``W[:, c].sum() * c``, exact without padding. Behind a zero-padded k x k reader the border sees fewer taps; all
    constants of such a layer have the same border, so they are merged into the weights of one of them, which stays.
    ``limits``: keep at least what these per-layer limits and multiples ask for. Raises UnsupportedModel where
    torch.fx cannot follow the model, NotEquivalent if the result differs on ``example_inputs``.
    """
    return fold(model, example_inputs, limits=limits, structure=structure).model  # type: ignore[return-value]


def fold(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    limits: Budget | None = None,
    structure: Structure | None = None,
    origin: Mapping[str, int] | None = None,
) -> Folded:
    """:func:`fold_dead_channels` with the masks and the new structure. ``origin``: units the limits refer to."""
    structure = structure or find_structure(model, example_inputs)
    origin = dict(origin or structure.units)
    kept = {g.name: torch.arange(g.units) for g in structure.groups}
    sizes, result = structure.units, model
    while True:
        constants = find_constants(result)
        if constants is None:
            raise UnsupportedModel(
                f"{type(model).__name__}: torch.fx cannot follow it, so its constant channels cannot be told"
            )
        keep, merged = _dead_units(result, structure, constants, limits, origin)
        if not keep:
            break
        result = _without(result, structure, constants, keep, merged)
        structure = structure.shrunk(keep)
        for name, mask in keep.items():
            kept[name] = kept[name][mask]
    if result is model:
        result = copy.deepcopy(model)
    else:
        _check(model, result, example_inputs)
    masks = {n: torch.zeros(sizes[n], dtype=torch.bool).index_fill(0, index, True) for n, index in kept.items()}
    return Folded(result, masks, structure)


def add_to_bias(model: nn.Module, layer: str, delta: Tensor, follower: str | None) -> None:
    """Add ``delta`` [c_out] to what the layer puts out, in place: through its batch norm's mean where there is one,
    else its bias.
    """
    module = model.get_submodule(layer)
    assert isinstance(module, nn.Conv2d | nn.Linear)
    with torch.no_grad():
        if module.bias is None and follower is not None:
            mean = model.get_submodule(follower).running_mean
            assert isinstance(mean, Tensor)
            mean -= delta.to(mean)
        elif module.bias is None:
            module.bias = nn.Parameter(delta.to(module.weight))
        else:
            module.bias += delta.to(module.bias)


@dataclass(frozen=True)
class Constants:
    """``inputs``: {Conv2d or Linear: [c_in] float64, the constant of each input channel, NaN where it is none}.
    ``followers``: {such a layer: the batch norm that alone reads its output}."""

    inputs: Mapping[str, Tensor]
    followers: Mapping[str, str]


def _dead_units(
    model: nn.Module, structure: Structure, constants: Constants, limits: Budget | None, origin: Mapping[str, int]
) -> tuple[Keep, dict[str, int]]:
    """{group: what stays} for the groups that lose something, and {group: the unit that takes over the constants of
    the others}.
    """
    keep: Keep = {}
    merged: dict[str, int] = {}
    for group in structure.groups:
        free, mergeable, keeper = _judge(model, group, constants)
        if keeper is not None:
            mergeable[keeper] = False
        order = [*free.nonzero().flatten().tolist(), *mergeable.nonzero().flatten().tolist()]
        most = min(len(order), group.units - 1)
        if limits is not None:
            smallest = group.units - most
            allowed = [u for u in allowed_units(group, limits, origin[group.name]) if smallest <= u <= group.units]
            most = group.units - allowed[0] if allowed else 0
        if most <= 0:
            continue
        mask = torch.ones(group.units, dtype=torch.bool)
        mask[order[:most]] = False
        keep[group.name] = mask
        if keeper is not None:
            merged[group.name] = keeper
    return keep, merged


def _judge(model: nn.Module, group: Group, constants: Constants) -> tuple[Tensor, Tensor, int | None]:
    """Units that go for nothing, units whose constants another could take over (with equal borders), and which one
    that would be.
    """
    free = torch.ones(group.units, dtype=torch.bool)
    mergeable = torch.ones(group.units, dtype=torch.bool)
    able = torch.ones(group.units, dtype=torch.bool)  # could take over the constants of others
    strength = torch.full((group.units,), torch.inf, dtype=torch.float64)
    for member in group.consumers:
        layer = model.get_submodule(member.layer)
        unread = (input_weights(layer, _live_weight(model, member.layer, constants)) == 0).cpu()
        value = constants.inputs.get(member.layer)
        value = torch.full((len(unread),), torch.nan, dtype=torch.float64) if value is None else value
        simple = unread | (value == 0) | (~value.isnan() & (not is_padded(layer)))
        free &= simple[member.index].all(1)
        if member.index.shape[1] > 1 or getattr(layer, "groups", 1) > 1:
            mergeable &= simple[member.index].all(1)
            continue
        mergeable &= (simple | ~value.isnan())[member.index].all(1)
        if is_padded(layer):
            mine = value[member.index].flatten()
            able &= ~mine.isnan() & (mine != 0)
            strength = torch.minimum(strength, mine.abs().nan_to_num(0.0))
    mergeable &= ~free
    able &= mergeable
    if not bool(able.any()):
        return free, torch.zeros_like(free), None
    return free, mergeable, int(torch.where(able, strength, -1.0).argmax())


def _live_weight(model: nn.Module, layer: str, constants: Constants) -> Tensor:
    """|weight|, with 0 for filters whose batch norm has scale 0: what they read does not matter."""
    weight = weight_of(model, layer).detach().abs()
    if layer in constants.followers:
        scale = model.get_submodule(constants.followers[layer]).weight
        if isinstance(scale, Tensor):
            weight = weight * (scale.detach() != 0).view(-1, *[1] * (weight.dim() - 1))
    return weight


def _without(
    model: nn.Module, structure: Structure, constants: Constants, keep: Keep, merged: Mapping[str, int]
) -> nn.Module:
    """Fold the constants of what goes into a copy, then cut the copy."""
    result = copy.deepcopy(model)
    for group in structure.groups:
        if group.name not in keep:
            continue
        gone = ~keep[group.name]
        for member in group.consumers:
            layer = result.get_submodule(member.layer)
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            value = torch.zeros(layer.weight.shape[1] * getattr(layer, "groups", 1), dtype=torch.float64)
            index = member.index[gone].flatten()
            value[index] = constants.inputs[member.layer][index].nan_to_num(0.0)  # NaN: unread here
            if is_padded(layer):
                if group.name in merged:
                    _merge_columns(
                        layer, constants.inputs[member.layer], value, int(member.index[merged[group.name], 0])
                    )
                continue
            if bool(value.any()):
                add_to_bias(result, member.layer, response(layer, value), constants.followers.get(member.layer))
    return shrink(result, keep, structure)[0]


def _merge_columns(layer: nn.Module, constant: Tensor, value: Tensor, into: int) -> None:
    """W[:, into] += sum over c of W[:, c] * value_c / constant_into: the same sum at every position, borders
    included.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        share = (value / constant[into]).to(weight.device)
        columns = value.nonzero().flatten().to(weight.device)
        total = torch.einsum("oc...,c->o...", weight[:, columns].double(), share[columns])
        weight[:, into] += total.to(weight.dtype)


def _check(model: nn.Module, result: nn.Module, example_inputs: Tensor) -> None:
    for before, after in zip(outputs(model, example_inputs), outputs(result, example_inputs), strict=True):
        if before.numel() == 0 or not bool(before.isfinite().all()):  # what overflows cannot be compared
            continue
        changed = before.shape != after.shape
        error = math.inf if changed else float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
        tolerance = 1e-9 if before.dtype == torch.float64 else 1e-2
        if not error <= tolerance:
            raise NotEquivalent(
                f"folding dead channels changed the outputs by {error:.2g} of their scale (over {tolerance:g})"
            )


POOLS = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


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
