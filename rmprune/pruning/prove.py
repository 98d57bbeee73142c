"""Proof that a cut removed what it says: the smaller network against the whole one, in float64. Cuts nothing itself.

A cut takes rows from the layers that make channels and columns from the layers that read them. It is right where

(a) the smaller network equals the whole one with those columns set to zero: what is left reads what it read before, and
(b) the latter does not change when those rows get other weights: nothing else read what they make.

Where channels meet in a product that is added over (queries and keys), rows of the one are set to zero and the other's get other weights.

The weights do not matter, the cut does: what folding and fitting change afterwards is theirs to check.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.errors import NotEquivalent, UnsupportedModel, first_line, out_of_memory
from rmprune.graph.copied import copied
from rmprune.graph.double import in_double
from rmprune.graph.equivalence import refuse_unseen
from rmprune.graph.foreign import reference_copy
from rmprune.graph.inputs import Inputs, as_tuple
from rmprune.graph.relative_error import comparison_base, comparison_inputs, hardly_depends, relative_error
from rmprune.graph.run import hooked
from rmprune.graph.tensors import floating_dtype, named_tensors, tensors_in
from rmprune.pruning.groups import Structure, layer_masks, mask_of, outputs
from rmprune.pruning.layers import Slices, output_dim, slices_of
from rmprune.pruning.surgery import shrink, tensor_slices

logger = logging.getLogger("rmprune")
TOLERANCE = 1e-9  # of (a) and (b), relative to what the inputs change in the outputs
GIVEN, DRAWN = 2, 1  # images of the examples, and random ones


def prove_cut(
    model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example_inputs: Inputs, *,
    network: nn.Module | None = None,
) -> float:  # fmt: skip
    """The largest error of (a) and (b) for the network that `shrink(model, keep, structure)` gives, relative, in float64.

    `network`: the one that many cuts led there, whatever its weights are by now; the whole one is then taken with these.
    example_inputs: (N, C, H, W) or several inputs, of which two are used, and a random one: three forward passes of three images.
    Where a cut so deep that the inputs no longer change the outputs would prove nothing, every other of the units that go is cut as well;
    where that tells no more (a head of zeros, class numbers as output), with weights that are drawn, and what layers give is compared, too.
    Raises NotEquivalent over TOLERANCE, with the name of the group whose removal alone already fails; UnsupportedModel where it is the
    network that does what torch.fx does not see.
    """
    if all(bool(mask.all()) for mask in keep.values()):
        return 0.0
    twin = reference_copy(model)
    own = whole_cut = {name: mask.cpu() for name, mask in keep.items()}
    last = None
    finite = network is not None and all(bool(p.isfinite().all()) for p in network.parameters())
    if network is not None and finite:  # NaN is for training to refuse
        last = reference_copy(network)
        _take_over(twin, last, tensor_slices(twin, structure, keep))

    def error(cut: Mapping[str, Tensor], drawn: bool = False) -> tuple[float, str, bool]:
        whole = _with_drawn_weights(twin) if drawn else twin
        smaller = shrink(whole, cut, structure)[0] if last is None or drawn or cut is not whole_cut else last
        slices = tensor_slices(whole, structure, cut)
        return _error(whole, smaller, slices, example_inputs, drawn, _silenced(whole, structure, cut))

    worst, why, told = error(own)
    if worst <= TOLERANCE and not told:
        own = {name: mask | (mask.logical_not().cumsum(0) % 2 == 0) for name, mask in own.items()}
        half, why, told = error(own)
        worst = max(worst, half)
    vague = not told
    if worst <= TOLERANCE and vague:
        drawn, why, told = error(own, drawn=True)
        worst = max(worst, drawn)
        if not told:
            logger.warning(
                "the proof of the cut says nothing: neither outputs nor layers depend on the inputs, whatever the weights"
            )
    if worst <= TOLERANCE:
        return worst
    refuse_unseen(model, as_tuple(model, example_inputs), TOLERANCE)
    for name, mask in own.items():  # rare: the reader wants to know which
        alone, what, _ = error({name: mask}, drawn=vague)
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
    """`prove_cut` for a cut that somebody else made (`by`): `slices` say what is left of each parameter and buffer. Raises NotEquivalent
    where it is wrong."""
    worst, why, told = _error(reference_copy(model), reference_copy(smaller), slices, example_inputs)
    if worst <= TOLERANCE and not told:
        logger.warning("%s: the outputs hardly depend on the inputs, so that its proof says little", by)
    if not worst <= TOLERANCE:
        raise NotEquivalent(f"{by}: {why} ({worst:.1e}); leave such layers whole, or prune by another method")
    return worst


@torch.no_grad()
def _error(
    twin: nn.Module, smaller: nn.Module, slices: Mapping[str, Slices], example_inputs: Inputs, maps: bool = False,
    silenced: Mapping[str, Slices] | None = None,
) -> tuple[float, str, bool]:  # fmt: skip
    """The larger of the errors of (a) and (b), what it means, and whether it tells anything: whether the inputs still change the outputs.

    `twin` is the whole network in float64, left alone. maps: what layers give is compared with the outputs, where the cut leaves it its
    shape: of class numbers the outputs alone tell little. `silenced`: rows that are zero in both (a) and (b), what of them stays.
    """
    given = as_tuple(twin, example_inputs)
    images, sizes = comparison_inputs(given, GIVEN, DRAWN)
    silent = copied(twin)
    _fill(silent, slices, torch.zeros_like, columns=True)
    _fill(silent, silenced or {}, torch.zeros_like, columns=False)
    try:
        found = _run(smaller, images, maps)
    except (RuntimeError, ValueError) as error:  # shapes that do not fit any more
        return float("inf"), f"the smaller network does not run: {first_line(error)}", True
    expected, base = _run(silent, images, maps), _run(silent, comparison_base(given), maps)
    alike = [key for key, value in expected.items() if key in found and found[key].shape == value.shape and key in base]
    if len(alike) < len(found) and not maps:
        return float("inf"), "the smaller network gives outputs of other shapes", True
    part = lambda values: [values[key] for key in alike]  # noqa: E731
    cut = relative_error(part(expected), part(found), sizes, part(base))
    telling = [key for key in alike if _tells(expected[key], base[key], sizes)]
    told = bool(telling) if maps else len(telling) == len(expected)
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
    others = relative_error(part(expected), part(_run(silent, images, maps)), sizes, part(base))
    return max(cut, others), "something else than the layers that were cut reads the removed channels", told


@torch.no_grad()
def _take_over(whole: nn.Module, smaller: nn.Module, slices: Mapping[str, Slices]) -> None:
    """Puts the tensors of `smaller` in their places in `whole`, in place. Raises NotEquivalent for other sizes than `slices` say."""

    def put(tensor: Tensor, own: Slices, part: Tensor) -> None:
        if own:
            (dim, index), *rest = own
            chosen = tensor.index_select(dim, index.cpu())
            put(chosen, tuple(rest), part)
            tensor.index_copy_(dim, index.cpu(), chosen)
        else:
            tensor.copy_(part)

    tensors = named_tensors(whole)
    for name, part in named_tensors(smaller).items():
        try:
            put(tensors[name], slices.get(name, ()), part)
        except (KeyError, RuntimeError) as error:
            raise NotEquivalent(f"{name}: {tuple(part.shape)} is not what the cuts leave of it; a fault") from error


def _with_drawn_weights(twin: nn.Module) -> nn.Module:
    """A copy with random weights in the place of its own, of a size that carries maps through."""
    generator = torch.Generator().manual_seed(1)
    drawn = copied(twin)
    for tensor in drawn.parameters():
        if tensor.dim() > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / tensor[0].numel() ** 0.5)
        elif tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5)
    return drawn


def _tells(value: Tensor, base: Tensor, sizes: list[int]) -> bool:
    """Whether the inputs change this output, and by more than a class number."""
    return (value.is_floating_point() or value.is_complex()) and not hardly_depends([value], sizes, [base])


def _run(network: nn.Module, inputs: tuple[Tensor, ...], maps: bool) -> dict[str, Tensor]:
    """The outputs by their place, and with `maps` what each layer gives each time that it is called."""
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        for place, tensor in enumerate(tensors_in(value)):
            found[f"{name} {place}"] = tensor.clone()

    counts: Counter[str] = Counter()

    def note(name: str, _: nn.Module, __: Any, value: Any) -> None:
        counts[name] += 1
        keep(f"{name} {counts[name]}", value)

    layers = ((name, module) for name, module in network.named_modules() if maps and not module._modules)
    with hooked(module.register_forward_hook(partial(note, name)) for name, module in layers):
        keep("output", in_double(network, inputs))
    return found


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
    tensors = named_tensors(model)
    for name, own in slices.items():
        layer, _, tensor = name.rpartition(".")
        rows = output_dim(model.get_submodule(layer), tensor)
        for dim, kept in own:
            if (dim != rows) == columns and tensors[name].is_floating_point():
                goes = ~mask_of(tensors[name].shape[dim], kept)
                at = (slice(None),) * dim + (goes,)
                tensors[name][at] = value(tensors[name][at])


def check_outputs(before: nn.Module, after: nn.Module, example_inputs: Inputs) -> None:
    """The pruned network runs, and its outputs have the shapes they had; the whole one ran. Raises UnsupportedModel else."""
    try:
        whole = outputs(before, example_inputs)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise UnsupportedModel(
            f"the network itself does not run in {floating_dtype(before)} ({first_line(error)}): give it in one dtype, without casts to "
            "another in forward"
        ) from error
    for expected, got in zip(whole, outputs(after, example_inputs), strict=True):
        if expected.shape != got.shape:
            raise UnsupportedModel(
                f"pruning changed an output's shape from {tuple(expected.shape)} to {tuple(got.shape)}"
            )
