"""The public calls of removal: normalise, find bounds, rewrite, build, check. Each stage lives in its own module."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.build import destination_of, materialise
from rmprune.graph.double import in_double
from rmprune.graph.equivalence import maps_error, over_tolerance, own_dtype_error, refuse_unseen
from rmprune.graph.foreign import reference_copy
from rmprune.graph.inputs import Inputs, as_given
from rmprune.graph.network import Network
from rmprune.graph.normalise import normalise
from rmprune.graph.ranges import annotate_ranges, may_shift, observe, tighten
from rmprune.graph.relative_error import Comparison, comparison_base, comparison_inputs
from rmprune.graph.tensors import to_double
from rmprune.graph.tf32 import tf32
from rmprune.removal.reports import Plan
from rmprune.removal.rewrite import remove_all
from rmprune.removal.settings import RemovalSettings

_PIXELS = 2**21  # of all images of the check and of the batch norms' statistics together
_IMAGE_MACS = 5 * 10**10  # of the original network on them


class NothingToRemove(UnsupportedModel):
    """No residual can go."""


@dataclass(frozen=True)
class Removal:
    """What `remove_residuals` made.

    model: eval mode, dtype, device and memory format of the original; a flat nn.Sequential where the graph is a chain.
    removed: names of the blocks whose residual is gone; kept: {name: reason} of the others.
    max_error: largest difference to the original in float64, relative to what the inputs change in its outputs, or in the maps
    before its head where the outputs hardly depend on the inputs (`note` says so); see `rmprune.graph.relative_error.relative_error`.
    own_dtype_error: the same of `model` in its own dtype, rounding and all; None where that was not compared (`note` says why).
    note: what to know of the comparison; empty as a rule.

    >>> model, images = rmprune.models.create("resnet8", num_classes=10, width=4).eval(), torch.randn(16, 3, 8, 8)
    >>> removal = rmprune.remove_residuals(model, images, keep=["layer3.0"])
    >>> removal.removed, removal.kept
    (['layer1.0', 'layer2.0'], {'layer3.0': 'kept, as asked for'})
    """

    model: nn.Module
    removed: list[str]
    kept: dict[str, str]
    max_error: float
    blocks: Plan
    own_dtype_error: float | None = None
    note: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What an artifact and a record say of it."""
        names = ("removed", "kept", "max_error", "own_dtype_error", "note")
        return {name: getattr(self, name) for name in names}

    def _repr_html_(self) -> str:
        said = f"removed {len(self.removed)} residuals, kept {len(self.kept)}; largest error {self.max_error:.1e}"
        return f"<p>{said}</p>{self.blocks._repr_html_()}"


@tf32(False, "cuda")
@torch.inference_mode(False)  # what it makes can be trained
def remove_residuals(
    model: nn.Module, example_inputs: Inputs, *, keep: Iterable[str] | None = (), ranges: str = "provable", form: str = "auto",
    batch_norm: bool = True, fuse: str = "cheaper", tolerance: float = 1e-10, margin: float = 0.5,
    input_range: tuple[float, float] = (-math.inf, math.inf), progress: Callable[[str], None] | None = None,
    fused: Iterable[str] | None = (), dropout: bool = False,
) -> Removal:  # fmt: skip
    """Removes residual connections exactly (RMNet, arXiv 2111.00687): the same function without additions. `model` is left alone.

    model: wrappers (DataParallel, torch.compile) are taken off, weights that are computed (weight norm, masks) made permanent.
    All parameters of the result are trainable, also those that were not, or that forward gives no gradients (`note` says where).
    What forward does in training alone (auxiliary outputs) is left out, a layer that is called twice becomes two, and a
    mapping of another type among the outputs (ModelOutput) a dict.
    example_inputs: one batch, (N, C, H, W), a tuple of inputs or a dict of them by the names in forward; sets the sizes and the
    statistics of new batch norms (from its first images, as many as 5e10 MACs allow). Removed blocks stay exact on other sizes,
    unless `note`, the result's or a block's, says otherwise (a pool with ceil_mode). keep: names of blocks to leave in. ranges:
    "provable" bounds hold for every input in `input_range`; "calibrated" ones are seen on example_inputs and widened by
    `margin` times their width, exact only inside. form: how copies pass an activation that is not the identity on their range:
    "auto", "shift" (one copy, needs bounds), "pair" (two copies), "slice" (one copy beside it; the result is no chain then;
    "auto" takes it only in blocks with a gate or a concatenation). batch_norm: False folds every batch norm, True only new ones
    whose variances the dtype of `model` cannot hold. fuse: "cheaper", "always" or "never" multiply neighbouring convolutions;
    always beside the blocks named in `fused`: what each ends in, and what enters it where no other block ends there.
    dropout: keep that of features, as before a classifier, for a network that is trained further; else all is left out, since in eval
    mode it does nothing (`note` says what). tolerance: on max_error, relative to what the inputs change in the outputs; in the dtype
    of `model` it may be off by 16 times the original's own rounding (see `rmprune.graph.equivalence.own_dtype_error`).

    Raises UnsupportedModel (cannot be traced, random in eval mode, or no residual can go), NotEquivalent (over tolerance, or off in
    the dtype of `model`), ConfigError (a bad setting).

    >>> model, images = rmprune.models.create("resnet8", num_classes=10, width=4).eval(), torch.randn(16, 3, 8, 8)
    >>> plain = rmprune.remove_residuals(model, images).model
    >>> type(plain).__name__, torch.allclose(plain(images), model(images), atol=1e-5)
    ('Sequential', True)
    """
    settings = RemovalSettings(keep, ranges, form, batch_norm, fuse, tolerance, margin, input_range, fused)
    model, inputs = as_given(model, example_inputs)
    reference = reference_copy(model)
    network, reports = _rewrite(reference, inputs, settings, progress, dropout)
    kept = {report.name: report.reason for report in reports if not report.removable}
    removed = [report.name for report in reports if report.removable]
    if not removed:
        refuse_unseen(model, inputs, tolerance)
        raise nothing_to_remove(kept)
    given, random = _image_counts(inputs[0], sum(report.macs_before for report in reports))
    inside = ranges == "provable"  # calibrated bounds promise nothing on other inputs
    checked, groups = comparison_inputs(inputs, given, random if inside else 0, limits=input_range)
    other = comparison_base(inputs, input_range)
    with torch.no_grad():  # a network may write into its inputs
        comparison = Comparison(checked, groups, in_double(reference, checked), other, in_double(reference, other))
    del reference
    destination = destination_of(model)
    result, found = materialise(network, checked, given, destination, batch_norm)
    error, where, note = comparison.error(found), "the outputs", ""
    if error <= tolerance and comparison.hardly_depends:
        build = lambda part, x: materialise(part, x, given, destination, batch_norm)[1]  # noqa: E731
        in_maps, names = maps_error(reference_copy(model), network, comparison, build)
        error, where = max(error, in_maps), f"the outputs and the maps {names}"
        note = (
            f"the outputs hardly depend on the inputs; compared as well: {f'the maps {names}' if names else 'nothing'}"
        )
    if not error <= tolerance:
        raise over_tolerance(model, comparison, error, tolerance, not inside, where)
    own, unseen = own_dtype_error(model, result, comparison, tolerance)
    if not inside and any("shift" in report.form or "pair" in report.form for report in reports if report.removable):
        unseen = "; ".join(
            filter(None, (unseen, f"exact where maps stay within {1 + 2 * margin:g} times the ranges of the examples"))
        )
    return Removal(result, removed, kept, error, reports, own, "; ".join(filter(None, (note, unseen, network.note))))


@tf32(False, "cuda")
def plan_removal(
    model: nn.Module, example_inputs: Inputs, *, keep: Iterable[str] | None = (), ranges: str = "provable", form: str = "auto",
    margin: float = 0.5, input_range: tuple[float, float] = (-math.inf, math.inf),
    batch_norm: bool = True, fuse: str = "cheaper", tolerance: float = 1e-10, fused: Iterable[str] | None = (),
) -> Plan:  # fmt: skip
    """What `remove_residuals` would do to each residual and what it would cost, without building anything.

    Returns a list of a BlockReport for each residual, in order, with the change of the whole network's MACs and parameters.

    >>> model, images = rmprune.models.create("resnet8", num_classes=10, width=4).eval(), torch.randn(16, 3, 8, 8)
    >>> [(block.name, block.removable, block.form, block.reserved) for block in rmprune.plan_removal(model, images)]
    [('layer1.0', True, 'free', 4), ('layer2.0', True, 'free', 4), ('layer3.0', True, 'free', 8)]
    """
    settings = RemovalSettings(keep, ranges, form, batch_norm, fuse, tolerance, margin, input_range, fused)
    model, inputs = as_given(model, example_inputs)
    return _rewrite(reference_copy(model), inputs, settings)[1]


def _rewrite(
    reference: nn.Module, inputs: tuple[Tensor, ...], settings: RemovalSettings,
    progress: Callable[[str], None] | None = None, dropout: bool = False,
) -> tuple[Network, Plan]:  # fmt: skip
    with torch.no_grad():
        network = normalise(reference, inputs, dropout=dropout)
        annotate_ranges(network, settings.input_range)
        doubles = tuple(to_double(x) for x in inputs)
        if settings.ranges == "calibrated":
            observe(network, doubles)
            tighten(network, settings.margin)
        elif may_shift(network):
            observe(network, tuple(x[:2] for x in doubles))
        return network, remove_all(network, settings, progress)


def _image_counts(images: Tensor, macs: int) -> tuple[int, int]:
    """How many given and random images are run in float64, so that a check of a large network takes seconds, not minutes."""
    budget = max(3, min(_IMAGE_MACS // max(1, macs), _PIXELS // max(1, math.prod(images.shape[2:]))))
    random = 4 if budget >= 8 else 2
    return max(1, min(len(images), budget - random)), random


def nothing_to_remove(kept: Mapping[str, str]) -> NothingToRemove:
    """The error where no residual goes. kept: {block: why it stays}."""
    if not kept:
        return NothingToRemove("there is no residual to remove: the network adds no two maps of one source")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
    return NothingToRemove(f"no residual to remove that can go: {reasons}")
