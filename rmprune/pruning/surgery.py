"""Physical removal of channels: a new, smaller module, with the optimiser's state cut along. Decides nothing."""

import copy
import functools
import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from rmprune.graph.copied import copied
from rmprune.graph.facts import facts_of, note
from rmprune.pruning.groups import Structure, layer_masks
from rmprune.pruning.layers import Slices, in_and_out, set_width, slices_of
from rmprune.pruning.written_sizes import write

logger = logging.getLogger("rmprune")
M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741


def shrink(
    model: M, keep: Mapping[str, Tensor], structure: Structure, optimizer: O | None = None
) -> tuple[M, O | None]:
    """A new module without the channels whose mask is False, and a new optimiser on its parameters.

    `keep`: {group of `structure`: bool [units]}, True stays. Momentum and other state of a parameter's shape is
    sliced with the same indices as the parameter; hyper-parameters and step counts stay. The arguments are left
    alone. Gradients that exist are sliced too. Slicing is our own and not Torch-Pruning's: one index per tensor
    serves weights, gradients and optimiser state alike.
    """
    slices = tensor_slices(model, structure, keep)
    memo: dict[int, Any] = {}
    old = dict(model.named_parameters())
    for name, parameter in old.items():
        memo[id(parameter)] = _new_parameter(parameter, slices.get(name, ()))
    for name, buffer in model.named_buffers():
        memo[id(buffer)] = take(buffer, slices.get(name, ()))
    smaller = copied(model, memo)
    masks = layer_masks(structure, keep)
    for (layer, side), mask in masks.items():
        if side in ("in", "out"):
            set_width(smaller.get_submodule(layer), side, int(mask.sum()))
    if isinstance(smaller, fx.GraphModule) and (sizes := {at: m for (at, side), m in masks.items() if side == "size"}):
        write(smaller.graph, sizes)
        smaller.recompile()
    note_kept(smaller, model, {layer: mask for (layer, side), mask in masks.items() if side == "out"})
    if optimizer is None:
        return smaller, None
    for parameter in old.values():
        _hand_over(parameter, memo[id(parameter)])
    return smaller, _shrink_optimizer(optimizer, {id(p): (memo[id(p)], slices.get(n, ())) for n, p in old.items()})


def note_kept(smaller: nn.Module, model: nn.Module, stays: Mapping[str, Tensor]) -> None:
    """Notes on `smaller`, cut from `model`, which output channels its layers have: {layer that could lose some: bool mask of `model`'s}.

    By their numbers in the network that was cut first; in `model` where another layer has been put in the place of one since.
    """
    kept: dict[str, list[int]] = dict(facts_of(model).get("kept", {}))
    for layer, mask in stays.items():
        own = mask.nonzero().flatten().tolist()
        before = kept.get(layer, ())
        kept[layer] = [before[i] for i in own] if len(before) == len(mask) else own
    note(smaller, kept=kept)


def note_cut(smaller: nn.Module, model: nn.Module, structure: Structure, error: float | None) -> None:
    """Notes on `smaller`, cut from `model`, what could not be pruned, and what the proof of the cut measured (None: it was left out)."""
    layers = [layer.name for layer in structure.layers if layer.kind != "rest"]
    cut = [x for x in layers if in_and_out(smaller.get_submodule(x))[1] < in_and_out(model.get_submodule(x))[1]]
    note(smaller, whole={name: why for name, why in structure.frozen.items() if name not in cut}, cut_error=error)


def take(tensor: Tensor, slices: Slices) -> Tensor:
    """A copy with only these indices, in the tensor's own memory format."""
    result = tensor.detach()
    for dim, index in slices:
        result = result.index_select(dim, index.to(tensor.device))
    if not slices:
        return result.clone(memory_format=torch.preserve_format)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()


def tensor_slices(model: nn.Module, structure: Structure, keep: Mapping[str, Tensor]) -> dict[str, Slices]:
    """{parameter or buffer: what of it stays}, for every tensor that loses something."""
    masks = layer_masks(structure, keep)
    slices: dict[str, Slices] = {}
    for layer in dict.fromkeys(layer for layer, side in masks if side in ("in", "out")):
        found = slices_of(model.get_submodule(layer), masks.get((layer, "out")), masks.get((layer, "in")))
        slices |= {f"{layer}.{name}": own for name, own in found.items()}
    return slices


def _new_parameter(parameter: nn.Parameter, slices: Slices) -> nn.Parameter:
    new = nn.Parameter(take(parameter, slices), requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        new.grad = take(parameter.grad, slices)
    return new


def _hand_over(old: nn.Parameter, new: nn.Parameter) -> None:
    """What a training loop has put on a parameter: hooks of its gradient, attributes."""
    vars(new).update(vars(old))
    for hook in (old._backward_hooks or {}).values():
        new.register_hook(hook)
    for after in (old._post_accumulate_grad_hooks or {}).values():
        new.register_post_accumulate_grad_hook(after)


def _shrink_optimizer(optimizer: O, new: Mapping[int, tuple[nn.Parameter, Slices]]) -> O:
    """The same optimiser on the new parameters; parameters it does not share with the model are kept as they are.

    What it keeps of a parameter is of the parameter's shape, one number, or torch's Adafactor's rows and columns. Of anything else nothing
    says what it belongs to: then parameters that are cut lose all theirs, which optimisers begin anew.
    """
    result = copy.copy(optimizer)
    result.param_groups = []
    result.state = defaultdict(dict)
    for group in optimizer.param_groups:
        parameters = [new[id(p)][0] if id(p) in new else p for p in group["params"]]
        result.param_groups.append({**group, "params": parameters})
    held = {p: state for p, state in optimizer.state.items() if isinstance(p, Tensor)}
    factored = isinstance(optimizer, torch.optim.Adafactor)  # others' choice of what to factor goes by sizes
    odd = {
        key: (value, p)
        for p, state in held.items()
        for key, values in state.items()
        for value in tree_leaves(values)
        if isinstance(value, Tensor) and not _follows(value, p, factored)
    }
    anew = 0
    result.state.update((key, state) for key, state in optimizer.state.items() if key not in held)
    for parameter, state in held.items():
        replacement, slices = new.get(id(parameter), (parameter, ()))
        if slices and not odd.keys().isdisjoint(state):
            anew += 1
            continue
        cut = functools.partial(_cut_along, parameter, slices)
        result.state[replacement] = {key: tree_map_only(Tensor, cut, value) for key, value in state.items()}
    if anew:
        key, (value, p) = next(iter(odd.items()))
        logger.warning(
            "%s keeps %s of sizes %s for a weight of %s, which cannot be cut like it: its state of %d weights that were cut begins anew",
            type(optimizer).__name__, key, list(value.shape), list(p.shape), anew,
        )  # fmt: skip
    return result


def _follows(value: Tensor, parameter: Tensor, factored: bool) -> bool:
    """Whether something that an optimiser keeps can be cut like its parameter; `factored`: with one of its sizes 1 as well."""
    sizes = zip(value.shape, parameter.shape, strict=False)
    alike = value.dim() == parameter.dim() and all(a == b or (factored and a == 1) for a, b in sizes)
    return alike or value.numel() == 1


def _cut_along(parameter: Tensor, slices: Slices, value: Tensor) -> Tensor:
    same = value.dim() == parameter.dim()
    return take(value, tuple((d, index) for d, index in slices if same and value.shape[d] == parameter.shape[d]))
