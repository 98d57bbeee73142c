"""Proof that a cut removed what it says: the smaller network against the whole one, in float64. Cuts nothing itself.

A cut takes channels from the layers that make them (producers) and the columns that read them (readers). It is right where

(a) the smaller network equals the whole one with those columns set to zero: what was left reads what it read before, and
(b) the latter does not change when the producers of these channels get other weights: nothing else read them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rmprune.errors import NotEquivalent
from rmprune.graph.equivalence import check_inputs, reference_copy, relative_error
from rmprune.pruning.groups import Structure
from rmprune.pruning.surgery import shrink

IMAGES = 2  # of the examples, and
RANDOM = 1  # of noise beside them
TOLERANCE = 1e-9  # of (a), relative; (b) is exact up to the order of sums


@torch.no_grad()
def prove_cut(
    model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example_inputs: Tensor, *,
    tolerance: float = TOLERANCE,
) -> float:  # fmt: skip
    """The largest error of (a) and (b) for the network that `shrink(model, keep, structure)` gives, relative, in float64.

    example_inputs: (N, C, H, W); its first images are used, and random ones. The weights do not matter, the cut does: what folding
    and fitting change afterwards is theirs to check. Three forward passes of three images.

    Raises NotEquivalent over `tolerance`, with the group whose removal alone already fails.
    """
    if all(bool(mask.all()) for mask in keep.values()):
        return 0.0
    twin = reference_copy(model)
    (images,), sizes = check_inputs((example_inputs,), IMAGES, RANDOM)
    worst, failed = _errors(twin, structure, keep, images, sizes)
    if not worst <= tolerance:
        for name, mask in keep.items():  # rare: the reader wants to know which
            alone, why = _errors(twin, structure, {name: mask}, images, sizes)
            if not alone <= tolerance:
                raise NotEquivalent(f"{name}: {why} ({alone:.1e}); leave it whole with ignore=[{name!r}]")
        raise NotEquivalent(f"the cut as a whole: {failed} ({worst:.1e})")
    return worst


def prove_groups(model: nn.Module, structure: Structure, example_inputs: Tensor) -> float:
    """`prove_cut` for a cut of every other unit of all groups: for networks that are then cut many times."""
    keep = {g.name: torch.arange(g.units) % 2 == 0 for g in structure.groups if g.units > 1}
    return prove_cut(model, structure, keep, example_inputs)


def _errors(
    twin: nn.Module, structure: Structure, keep: Mapping[str, Tensor], images: Tensor, sizes: list[int]
) -> tuple[float, str]:
    """The larger of the errors of (a) and (b), and what it means."""
    silent = _without_readers(twin, structure, keep)
    expected = silent(images.clone())
    try:
        smaller = shrink(twin, dict(keep), structure)[0](images.clone())
    except (RuntimeError, ValueError) as error:  # shapes that do not fit any more
        return float("inf"), f"the smaller network does not run: {str(error).splitlines()[0][:200]}"
    cut = relative_error(expected, smaller, sizes)
    _disturb_producers(silent, structure, keep)
    others = relative_error(expected, silent(images.clone()), sizes)
    if cut > TOLERANCE:
        return cut, "the smaller network differs from the whole one without the columns that read the removed channels"
    return max(cut, others), "something else than the layers that were cut reads the removed channels"


def _without_readers(twin: nn.Module, structure: Structure, keep: Mapping[str, Tensor]) -> nn.Module:
    """A copy whose columns that read removed channels are zero."""
    silent = reference_copy(twin)
    for group in structure.groups:
        for member in group.consumers if group.name in keep else ():
            weight = silent.get_submodule(member.layer).weight
            assert isinstance(weight, Tensor)
            groups = getattr(silent.get_submodule(member.layer), "groups", 1)
            columns = member.index[~keep[group.name].cpu()].flatten()
            rows, width = weight.shape[0] // groups, weight.shape[1]
            for column in columns.tolist():  # column c is column c % width of convolution group c // width
                first = column // width * rows
                weight[first : first + rows, column % width] = 0
    return silent


def _disturb_producers(silent: nn.Module, structure: Structure, keep: Mapping[str, Tensor]) -> None:
    """Other weights for whatever makes the removed channels, in place."""
    generator = torch.Generator().manual_seed(0)
    for group in structure.groups:
        for member in group.members if group.name in keep else ():
            if member.side == "in":
                continue
            rows = member.index[~keep[group.name].cpu()].flatten()
            module = silent.get_submodule(member.layer)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.dim() and tensor.is_floating_point():
                    noise = torch.rand(tensor[rows].shape, generator=generator, dtype=tensor.dtype) + 0.5
                    tensor[rows] = noise  # positive: a variance stays one
