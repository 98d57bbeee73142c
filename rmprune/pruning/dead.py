"""Exact removal of channels that compute nothing (RM.md 6): constants are folded into readers, unread ones just go."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from rmprune.errors import NotEquivalent
from rmprune.graph.copied import copied
from rmprune.graph.foreign import reference_copy
from rmprune.graph.inputs import Inputs, as_tuple
from rmprune.graph.tensors import to_double
from rmprune.graph.tf32 import tf32
from rmprune.pruning.budget import Budget, allowed_units
from rmprune.pruning.constants import Constants, add_to_bias, find_constants, is_padded, response, to_be_trained
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Group, Keep, Structure, mask_of, outputs
from rmprune.pruning.layers import by_input, by_output, output_dim, weight_of
from rmprune.pruning.reading import Reading, read
from rmprune.pruning.surgery import shrink

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Folded:
    """`model` without its dead channels; `keep`: which units of the original structure it still has;
    `structure` and `constants`: of `model`.
    """

    model: nn.Module
    keep: Keep
    structure: Structure
    constants: Constants


@tf32(False, "cuda")
@torch.inference_mode(False)  # what it makes can be trained
def fold_dead_channels(
    model: M, example_inputs: Inputs, *, limits: Budget | None = None, structure: Structure | None = None
) -> M:
    """A new network, equal in eval mode, without channels that are constant or that nobody reads, to a fixpoint.

    A constant c (batch-norm scale 0, or computed from constants alone) goes into its reader's batch norm or bias:
    `W[:, c].sum() * c`, exact without padding. Behind a zero-padded k x k reader the border sees fewer taps; all
    constants of such a layer have the same border, so they are merged into the weights of one of them, which stays.
    A batch norm that was never trained and whose scales are all 0 (zero_init_residual) is no sign of death.
    `limits`: keep at least what these per-layer limits and multiples ask for. Raises UnsupportedModel where
    torch.fx cannot follow the model, NotEquivalent if the result differs on `example_inputs`.
    """
    return fold_dead(model, example_inputs, limits=limits, structure=structure).model  # type: ignore[return-value]


def fold_dead(
    model: nn.Module, example_inputs: Inputs, *, limits: Budget | None = None, structure: Structure | None = None,
    origin: Mapping[str, int] | None = None, reading: Reading | None = None, fold: bool = True, own: bool = False,
) -> Folded:  # fmt: skip
    """`fold_dead_channels` with the masks and the new structure. `origin`: units the limits refer to; `reading`: as in `find_constants`.

    `fold`: False leaves them, and only finds the constants. `own`: the network may be given back, not a copy, where nothing goes.
    """
    reading = reading or read(model, example_inputs, values=True)
    structure = structure or find_structure(model, example_inputs, reading=reading)
    origin = dict(origin or structure.units)
    kept = {g.name: torch.arange(g.units) for g in structure.groups}
    sizes, result, steps = structure.units, model, []
    while True:
        constants = find_constants(result, reading)
        keep, merged = _dead_units(result, structure, constants, limits, origin)
        if not keep or not fold:
            break
        steps.append((structure, constants, keep, merged))
        result = _without(result, *steps[-1])
        structure = structure.shrunk(keep)
        for name, mask in keep.items():
            kept[name] = kept[name][mask]
    if result is model:
        result = model if own else copied(model)
    else:
        _check(model, result, example_inputs)
        twin = before = reference_copy(model)
        for step in steps:
            twin = _without(twin, *step)
        _check(before, twin, tuple(to_double(x[:2]) for x in as_tuple(model, example_inputs)))
    masks = {n: mask_of(sizes[n], index) for n, index in kept.items()}
    return Folded(result, masks, structure, constants)


def _dead_units(
    model: nn.Module, structure: Structure, constants: Constants, limits: Budget | None, origin: Mapping[str, int]
) -> tuple[Keep, dict[str, int]]:
    """{group: what stays} for the groups that lose something, and {group: the unit that takes over the constants of the others}."""
    keep: Keep = {}
    merged: dict[str, int] = {}
    for group in structure.groups:
        if group.paired:  # what of it is dead, two layers say together
            continue
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
    """Units that go for nothing, units whose constants another could take over (with equal borders), and which one that would be."""
    free = torch.ones(group.units, dtype=torch.bool)
    mergeable = torch.ones(group.units, dtype=torch.bool)
    able = torch.ones(group.units, dtype=torch.bool)  # could take over the constants of others
    strength = torch.full((group.units,), torch.inf, dtype=torch.float64)
    for member in group.consumers:
        layer = model.get_submodule(member.layer)
        unread = (by_input(layer, _live_weight(model, member.layer, constants)) == 0).cpu()
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
    """|weight| by outputs, with 0 for filters whose batch norm has scale 0: what they read does not matter."""
    weight = by_output(model.get_submodule(layer), weight_of(model, layer).detach().abs())
    if layer in constants.norms_behind:
        norm = model.get_submodule(constants.norms_behind[layer])
        scale = norm.weight
        if isinstance(scale, Tensor) and not to_be_trained(norm):
            weight = weight * (scale.detach() != 0).view(-1, *[1] * (weight.dim() - 1))
    return weight


def _without(
    model: nn.Module, structure: Structure, constants: Constants, keep: Keep, merged: Mapping[str, int]
) -> nn.Module:
    """Fold the constants of what goes into a copy, then cut the copy."""
    result = copied(model)
    for group in structure.groups:
        if group.name not in keep:
            continue
        gone = ~keep[group.name]
        for member in group.consumers:
            layer = result.get_submodule(member.layer)
            value = torch.zeros(member.size, dtype=torch.float64)
            index = member.index[gone].flatten()
            value[index] = constants.inputs[member.layer][index].nan_to_num(0.0)  # NaN: unread here
            if is_padded(layer):
                if group.name in merged:
                    _merge_columns(
                        layer, constants.inputs[member.layer], value, int(member.index[merged[group.name], 0])
                    )
                continue
            if bool(value.any()):
                add_to_bias(result, member.layer, response(layer, value), constants.norms_behind.get(member.layer))
    return shrink(result, keep, structure)[0]


def _merge_columns(layer: nn.Module, constant: Tensor, value: Tensor, into: int) -> None:
    """W[:, into] += sum over c of W[:, c] * value_c / constant_into: the same sum at every position, borders included."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        share = (value / constant[into]).to(weight.device)
        columns = value.nonzero().flatten().to(weight.device)
        by_column = weight.movedim(1 - output_dim(layer, "weight"), 0)
        by_column[into] += torch.einsum("c...,c->...", by_column[columns].double(), share[columns]).to(weight.dtype)


def _check(model: nn.Module, result: nn.Module, example_inputs: Inputs) -> None:
    for before, after in zip(outputs(model, example_inputs), outputs(result, example_inputs), strict=True):
        if before.numel() == 0 or not bool(before.isfinite().all()):  # what overflows cannot be compared
            continue
        changed = before.shape != after.shape
        error = math.inf if changed else float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
        tolerance = 1e-9 if before.dtype == torch.float64 else 1e-2  # of weights that were rounded
        if not error <= tolerance:
            raise NotEquivalent(
                f"folding dead channels changed the outputs by {error:.2g} of their scale (over {tolerance:g})"
            )
