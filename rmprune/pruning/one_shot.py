"""Prune a network in one cut: dead channels exactly, then the least important ones to the budget.

For cuts while training: `gradual.py`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from rmprune.config.fields import require_types
from rmprune.data.batches import Batches, Loss, with_loss
from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.graph.inputs import Inputs, as_given, only_input
from rmprune.graph.tf32 import tf32
from rmprune.measure.cost import count_macs
from rmprune.measure.planner import activation_memory
from rmprune.pruning.allocate import allocate, allocate_uniform
from rmprune.pruning.budget import Budget, Target, refuse_no_budget, resolve
from rmprune.pruning.compensate import compensated, removed_means
from rmprune.pruning.dead import Folded, fold_dead
from rmprune.pruning.groups import Keep, Scores, Structure, inner_only, total_cost
from rmprune.pruning.importance import Importance, score_groups
from rmprune.pruning.layers import Cost, macs
from rmprune.pruning.named import leave_whole, refuse_unknown
from rmprune.pruning.peak_memory import ActivationPeaks, byte_limit, with_reference
from rmprune.pruning.prove import check_outputs, prove_cut
from rmprune.pruning.prunable import find_prunable
from rmprune.pruning.refit import fitting, fitting_images, refit, refuse_no_images
from rmprune.pruning.surgery import note_cut, shrink

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
BEYOND = 0.9  # of the budget: whoever gets less, because channels were dead, is told
logger = logging.getLogger("rmprune")


@tf32(False, "cuda")
@torch.inference_mode(False)  # what it makes can be trained
def prune(
    plain: M,
    example_inputs: Inputs,
    *,
    importance: str | Mapping[str, Tensor] | Importance = "batch_norm",
    budget: Budget,
    data: Batches | None = None,
    loss: Loss | None = None,
    cost: Cost | None = None,
    rank: str = "per_cost",
    which: Literal["free", "inner", "uniform"] = "free",
    compensate: bool = True,
    reconstruct: bool = False,
    lookahead: int = 1,
    origin: Mapping[str, int] | None = None,
    prove: bool = True,
    begin: Mapping[str, int] | None = None,
    ignore: Iterable[str] | None = (),
    dead: bool = True,
    nearest: bool = True,
) -> M:
    """A new, physically smaller network that meets the budget; the argument is left alone and the mode (train or
    eval) kept. Where the budget cannot be met else because code writes sizes down (attention), the result is a torch.fx graph of the
    same layers in which other sizes are written, and dropout as a function is off; the log says so.

    `importance`: a name of `rmprune.pruning.importance.IMPORTANCES`, a table {layer or group: Tensor
    [channels]}, or a callable. `data`: (images, labels) batches, for importances that are measured and, with
    `compensate`, for folding the mean of each removed live channel into its readers (the least-squares intercept; those with
    neither a bias nor a batch norm behind them get a bias). `loss`: any function of
    (model, batch) that runs the model and returns a scalar tensor, for batches of any other form and networks that are no classifiers
    (regression, segmentation, several labels); the default is the mean cross entropy. `reconstruct`: instead, fit every
    layer of the result to the uncut network's by least squares on (part of) `data`. `cost` and `lookahead`: for `latency_ratio`, see
    `rmprune.pruning.allocate.allocate`. `which`: all groups by importance, those inside blocks only, or the
    same fraction of each. `origin`: units that limits refer to, where the network was cut before. Works
    on networks with residuals as well (their streams are then pruned coupled). `prove`: the cut is compared with the whole
    network in float64 (`rmprune.pruning.prove`; three passes of three images); without it only where it was proved before.
    `begin`: widths to descend from (see `rmprune.pruning.allocate.allocate`).
    Channels stay that layers need which run in training alone (auxiliary heads), since the result may be trained.
    `ignore`: names of modules all of whose output channels stay, and those tied to them (of a block: of each layer in it).
    `dead`: channels that compute nothing go first, all of them, which is exact and may save more than was asked for (the log
    says so); False leaves them to importance and budget. `nearest`: where a cut leaves channels that nothing reads, which go as well and
    may save more than was asked for, less is cut; False for a search that measures what it gets.

    What the cut did is plain data on the result, `pruned.rmprune_facts`, which `rmprune.save` keeps: `kept` {layer: the numbers
    that its output channels have in `plain`, or in what that was cut from}, `whole` {layer or group: why it could not be pruned},
    and `cut_error`, what the proof measured (None without it).

    Raises NotEquivalent where the cut took other columns than those that read what went, InfeasibleBudget where limits forbid
    the budget, UnsupportedModel where no channel can be pruned or layers cannot be fitted, ConfigError for names that are not
    there, DataError for data or a loss that says nothing.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    >>> pruned = rmprune.prune(net, torch.randn(2, 3, 8, 8), importance="batch_norm", budget=rmprune.Budget(ratio=0.5))
    >>> pruned[0].out_channels, pruned[3].in_channels, net[0].out_channels
    (8, 8, 16)
    >>> len(pruned.rmprune_facts["kept"]["0"]), pruned.rmprune_facts["whole"]
    (8, {'3': "its channels are the network's output"})
    """
    _refuse_settings(budget, lookahead, reconstruct, data, which)
    data = with_loss(data, loss)
    plain, example_inputs = as_given(plain, example_inputs)  # type: ignore[assignment]

    def settle(structure: Structure, network: nn.Module) -> Structure:
        refuse_unknown(structure, network, origin=origin, begin=begin)
        return leave_whole(inner_only(structure) if which == "inner" else structure, network, ignore)

    plain, reading, structure = find_prunable(plain, example_inputs, budget, cost, origin, settle, values=True)  # type: ignore[assignment]
    origin = {**structure.units, **(origin or {})}
    alone = budget.name == "memory_ratio"
    image: Tensor | None = None
    if alone:
        _refuse_costs_of_layers(begin, rank, lookahead)
    if budget.memory_ratio is not None:
        image = only_input(example_inputs, "a budget of memory")[:1]
        budget = with_reference(budget, plain, image)
    target = Target(macs, math.inf, math.inf) if alone else resolve(structure, budget, cost, memory=True)

    if isinstance(importance, Mapping):
        importance = score_groups(importance, plain, structure)
    fold = partial(fold_dead, limits=budget, origin=origin, reading=reading, fold=dead)
    folded = fold(plain, example_inputs, structure=structure)
    model, structure = folded.model, folded.structure
    if isinstance(importance, Mapping):
        importance = {name: scores[folded.keep[name]] for name, scores in importance.items() if name in folded.keep}
    scores = score_groups(importance, model, structure, data)
    means = removed_means(folded, data) if compensate and not reconstruct else {}

    held = _held(model, structure, scores, budget, image, origin, which)
    choose = _Allocator(structure, scores, budget, target, origin, which, rank, lookahead, begin, held)
    cut = partial(_cut, folded, means, partial(fold, own=True), target, example_inputs)
    pruned, keep = _within(choose, cut, folded, nearest)
    error = prove_cut(model, structure, keep, example_inputs) if prove else None
    if reconstruct:
        with fitting():
            pruned = refit(model, structure, keep, fitting_images(data or (), plain)).train(plain.training)
    check_outputs(plain, pruned, example_inputs)
    if image is not None and activation_memory(pruned, image).peak_bytes > byte_limit(budget):
        raise UnsupportedModel("its peak memory does not follow from the widths of its groups; give macs_ratio instead")
    note_cut(pruned, plain, structure, error)
    return pruned  # type: ignore[return-value]


def _refuse_settings(budget: Budget, lookahead: int, reconstruct: bool, data: Batches | None, which: str) -> None:
    refuse_no_budget(budget)
    require_types(prune, {"lookahead": lookahead})
    refuse_no_images(reconstruct, data)
    if which not in ("free", "inner", "uniform"):
        raise ConfigError(f"which must be 'free', 'inner' or 'uniform', got {which!r}")


def _refuse_costs_of_layers(begin: Mapping[str, int] | None, rank: str, lookahead: int) -> None:
    """For a budget of memory with no other beside it."""
    if begin or rank != "per_cost" or lookahead != 1:
        raise ConfigError(
            "begin, rank and lookahead count costs of layers; a budget of memory goes by the peak, leave them out"
        )


def _held(
    model: nn.Module, structure: Structure, scores: Scores, budget: Budget, image: Tensor | None, origin: Mapping[str, int],
    which: str,
) -> Keep:  # fmt: skip
    """What a budget of memory lets stay, on this image; nothing where there is none."""
    if image is None:
        return {}
    peaks = ActivationPeaks(model, structure, image)
    return peaks.allocate(structure, scores, budget, uniform=which == "uniform", origin=origin)


@dataclass(frozen=True)
class _Allocator:
    """Which units stay at a limit of the budget's cost, of those that memory lets stay: `held`. All else: as `prune` takes it."""

    structure: Structure
    scores: Scores
    budget: Budget
    target: Target
    origin: Mapping[str, int]
    which: str
    rank: str
    lookahead: int
    begin: Mapping[str, int] | None
    held: Keep

    def __call__(self, limit: float) -> Keep:
        target = replace(self.target, limit=limit)
        if self.which == "uniform":
            even = allocate_uniform(self.structure, self.scores, self.budget, target=target, origin=self.origin)
            # The best of each: one holds the other.
            return {name: mask & self.held.get(name, mask) for name, mask in even.items()}
        return allocate(
            self.structure, self.scores, self.budget, target=target, origin=self.origin, rank=self.rank,
            lookahead=self.lookahead, begin=self.begin, most={name: int(mask.sum()) for name, mask in self.held.items()},
        )  # fmt: skip


def _within(
    choose: _Allocator, cut: Callable[[Keep], tuple[float, tuple[nn.Module, Keep]]], folded: Folded, nearest: bool
) -> tuple[nn.Module, Keep]:
    """The network cut to the budget, and the units that it has; whoever gets much less, because channels were dead, is told."""
    budget, target, structure = choose.budget, choose.target, choose.structure
    if budget.name == "memory_ratio":
        return cut(choose.held)[1]
    if not nearest:
        return cut(choose(target.limit))[1]
    whole = total_cost(structure, target.cost)
    pruned, keep = _nearest(choose, cut, target.limit, whole)
    if not all(bool(mask.all()) for mask in folded.keep.values()):
        # What memory took beside it, no dead channel did.
        spent = total_cost(structure.shrunk(keep), target.cost) if budget.memory_ratio is None else whole
        _tell_beyond(budget, target, spent)
    return pruned, keep


def _cut(
    folded: Folded, means: Mapping[str, Tensor], fold: Callable[..., Folded], target: Target, example_inputs: Inputs,
    keep: Keep,
) -> tuple[float, tuple[nn.Module, Keep]]:  # fmt: skip
    """The network with these units, less those that nothing reads then: what it costs, itself, and the units that it has."""
    model, structure = folded.model, folded.structure
    result = shrink(compensated(model, structure, keep, means, folded.constants.norms_behind), keep, structure)[0]
    done = fold(result, example_inputs, structure=structure.shrunk(keep))
    spent = total_cost(done.structure, target.cost)
    if target.cost is macs and any(layer.kind == "rest" for layer in structure.layers):
        spent = count_macs(done.model, example_inputs)  # products of narrower maps cost less, which no group says
    return spent, (done.model, _both(keep, done.keep))


def _tell_beyond(budget: Budget, target: Target, spent: float) -> None:
    """Warns whoever gets much less than was asked for."""
    if spent < BEYOND * target.limit:
        logger.warning(
            "prune: channels that compute nothing went beyond the budget: %s is %.3g where %g was asked for; dead=False leaves them",
            budget.name, target.as_ratio(budget, spent), budget.value,
        )  # fmt: skip


def _both(keep: Keep, further: Keep) -> Keep:
    """The units that stay after `keep` and then, counted among those, `further`."""
    found = dict(keep)
    for name, mask in further.items():
        if name in keep:
            found[name] = keep[name].clone()
            found[name][keep[name]] = mask.to(keep[name].device)
        else:
            found[name] = mask
    return found


def _nearest(choose: Callable[[float], Keep], cut: Callable[[Keep], tuple[float, T]], limit: float, most: float) -> T:
    """The cut whose cost comes nearest to `limit` from below.

    A cut can leave others unread (a reserved copy whose merge is gone), which then go as well: where that saves more
    than was asked for, aim higher.
    """
    below = choose(limit)  # what the ends of the interval led to
    above: Keep | None = None
    best_cost, best = cut(below)
    low, high = limit, most
    for _ in range(6):
        if best_cost >= 0.98 * limit or high - low < 0.01 * limit:
            break
        aim = (low + high) / 2
        keep = choose(aim)
        if _same(keep, below):
            low = aim
            continue
        if above is not None and _same(keep, above):
            high = aim
            continue
        cost, result = cut(keep)
        if cost > limit:
            high, above = aim, keep
            continue
        low, below = aim, keep
        if cost > best_cost:
            best_cost, best = cost, result
    return best


def _same(first: Keep, second: Keep) -> bool:
    return all(torch.equal(mask, second[name]) for name, mask in first.items())
