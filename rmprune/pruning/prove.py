"""Proof that a cut removed what it says: the smaller network against the whole one, in float64. Cuts nothing itself.

A cut takes rows from the layers that make channels and columns from the layers that read them. It is right where

(a) the smaller network equals the whole one with those columns set to zero: what is left reads what it read before, and
(b) the latter does not change when those rows get other weights: nothing else read what they make.

Where channels meet in a product that is added over (queries and keys), rows of the one are set to zero and the other's get other weights.

The weights do not matter, the cut does: what folding and fitting change afterwards is theirs to check.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.errors import NotEquivalent
from rmprune.graph.equivalence import base_inputs, check_inputs, hardly_depends, reference_copy, relative_error
from rmprune.graph.inputs import Inputs, as_tuple
from rmprune.pruning.groups import Structure, layer_masks
from rmprune.pruning.layers import Slices, output_dim, slices_of
from rmprune.pruning.surgery import shrink, tensor_slices

TOLERANCE = 1e-9  # of (a) and (b), relative to what the inputs change in the outputs
GIVEN, DRAWN = 2, 1  # images of the examples, and random ones


def prove_cut(model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example_inputs: Inputs) -> float:
    """The largest error of (a) and (b) for the network that `shrink(model, keep, structure)` gives, relative, in float64.

    example_inputs: (N, C, H, W) or several inputs, of which two are used, and a random one: three forward passes of three images.
    Where a cut so deep that the inputs no longer change the outputs would prove nothing, every other of the units that go is cut as well.
    Raises NotEquivalent over TOLERANCE, with the name of the group whose removal alone already fails.
    """
    if all(bool(mask.all()) for mask in keep.values()):
        return 0.0
    twin = reference_copy(model)
    own = {name: mask.cpu() for name, mask in keep.items()}

    def error(cut: Mapping[str, Tensor]) -> tuple[float, str, bool]:
        smaller, slices = shrink(twin, cut, structure)[0], tensor_slices(twin, structure, cut)
        return _error(twin, smaller, slices, example_inputs, _silenced(twin, structure, cut))

    worst, why, told = error(own)
    if worst <= TOLERANCE and not told:
        own = {name: mask | (mask.logical_not().cumsum(0) % 2 == 0) for name, mask in own.items()}
        half, why, _ = error(own)
        worst = max(worst, half)
    if worst <= TOLERANCE:
        return worst
    for name, mask in own.items():  # rare: the reader wants to know which
        alone, what, _ = error({name: mask})
        if not alone <= TOLERANCE:
            raise NotEquivalent(f"{name}: {what} ({alone:.1e}); a fault, nothing was cut")
    raise NotEquivalent(f"the cut as a whole: {why} ({worst:.1e}); a fault, nothing was cut")


def prove_groups(model: nn.Module, structure: Structure, example_inputs: Inputs) -> float:
    """`prove_cut` for every other unit of all groups: for a network that is then cut many times (a search, cuts while training)."""
    keep = {g.name: torch.arange(g.units) % 2 == 0 for g in structure.groups}
    return prove_cut(model, structure, keep, example_inputs)


def prove_slices(
    model: nn.Module, smaller: nn.Module, slices: Mapping[str, Slices], example_inputs: Inputs, by: str
) -> float:
    """`prove_cut` for a cut that somebody else made (`by`): `slices` say what is left of each parameter and buffer."""
    worst, why, _ = _error(reference_copy(model), reference_copy(smaller), slices, example_inputs)
    if not worst <= TOLERANCE:
        raise NotEquivalent(f"{by}: {why} ({worst:.1e}); leave such layers whole, or prune by another method")
    return worst


@torch.no_grad()
def _error(
    twin: nn.Module,
    smaller: nn.Module,
    slices: Mapping[str, Slices],
    example_inputs: Inputs,
    silenced: Mapping[str, Slices] | None = None,
) -> tuple[float, str, bool]:
    """The larger of the errors of (a) and (b), what it means, and whether it tells anything: whether the inputs still change the outputs.

    `twin` is the whole network in float64, left alone. `silenced`: rows that are zero in both (a) and (b), what of them stays.
    """
    given = as_tuple(twin, example_inputs)
    images, sizes = check_inputs(given, GIVEN, DRAWN)
    other = base_inputs(given)

    def run(network: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        return network(*(x.clone() for x in inputs))

    silent = copy.deepcopy(twin)
    _fill(silent, slices, torch.zeros_like, columns=True)
    _fill(silent, silenced or {}, torch.zeros_like, columns=False)
    expected, base = run(silent, images), run(silent, other)
    try:
        found = run(smaller, images)
    except (RuntimeError, ValueError) as error:  # shapes that do not fit any more
        return float("inf"), f"the smaller network does not run: {str(error).splitlines()[0][:200]}", True
    cut = relative_error(expected, found, sizes, base)
    told = not hardly_depends(expected, sizes, base)
    if not cut <= TOLERANCE:
        return (
            cut,
            "the smaller network differs from the whole one without the columns that read the removed channels",
            told,
        )
    generator = torch.Generator().manual_seed(0)  # from 0.5 on: a variance stays one
    drawn = lambda gone: torch.rand(gone.shape, generator=generator, dtype=gone.dtype) + 0.5  # noqa: E731
    _fill(silent, slices, drawn, columns=False)
    _fill(silent, silenced or {}, torch.zeros_like, columns=False)
    others = relative_error(expected, run(silent, images), sizes, base)
    return max(cut, others), "something else than the layers that were cut reads the removed channels", told


def _silenced(model: nn.Module, structure: Structure, keep: Mapping[str, Tensor]) -> dict[str, Slices]:
    """{tensor: what stays} of the outputs that others meet in a product which is added over (keys, where queries are cut): they are what
    reads those others."""
    masks = {layer: mask for (layer, side), mask in layer_masks(structure, keep).items() if side == "zero"}
    return {
        f"{layer}.{name}": own
        for layer, mask in masks.items()
        for name, own in slices_of(model.get_submodule(layer), mask, None).items()
        if name in ("weight", "bias")
    }


def _fill(model: nn.Module, slices: Mapping[str, Slices], value: Callable[[Tensor], Tensor], *, columns: bool) -> None:
    """Puts `value(what goes)` in the place of what goes of each tensor, in place: its columns, or its rows."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, own in slices.items():
        layer, _, tensor = name.rpartition(".")
        rows = output_dim(model.get_submodule(layer), tensor)
        for dim, kept in own:
            if (dim != rows) == columns and tensors[name].is_floating_point():
                goes = torch.ones(tensors[name].shape[dim], dtype=torch.bool).index_fill(0, kept.cpu(), False)
                at = (slice(None),) * dim + (goes,)
                tensors[name][at] = value(tensors[name][at])
