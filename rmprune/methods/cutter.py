"""How one method cuts one network: its budget, one cut, or the hook that cuts while training. Trains and measures nothing itself."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from rmprune.config import PruneConfig, SlimConfig
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.graph.inputs import Given, as_given, as_tuple
from rmprune.measure.place import NEAR, Place, find_ratio
from rmprune.methods.costs import layer_times, place_of
from rmprune.methods.table import Method
from rmprune.pruning import Budget, GradualPruner, allocate, find_structure, prune, prune_coupled, shrink
from rmprune.pruning.allocate import Meter, even_fraction, least_cost
from rmprune.pruning.budget import resolve
from rmprune.pruning.coupled import check_coupled, loss_gradients
from rmprune.pruning.gradual import between_cuts
from rmprune.pruning.groups import Scores, Structure, inner_only, total_cost
from rmprune.pruning.importance import IMPORTANCES, NothingMatters, score_groups
from rmprune.pruning.layers import Cost, macs
from rmprune.pruning.peak_memory import ActivationPeaks, byte_limit
from rmprune.pruning.plan import SlimPlan
from rmprune.pruning.program import read_program
from rmprune.pruning.prunable import find_prunable
from rmprune.pruning.refit import fitting
from rmprune.pruning.time_cost import TimeCost
from rmprune.training.job import Job
from rmprune.training.teacher import digest

logger = logging.getLogger("rmprune")
BELOW = (1.0, 0.86, 0.74)  # of what the widths of a plan cost: where a budget in time is looked for first
ROUGH = 0.92  # of a budget in time: what takes so much is near enough to be judged by; what goes on is cut anew
LEAST_FRACTION = 0.5  # every layer keeps at least this part of what an even cut would leave it


@dataclass(frozen=True)
class Cutter:
    """How one method cuts one network, which is on the job's device; networks that are cut from it are on the CPU.

    `place`: where time counts, for budgets in measured time; `cost`: what such a budget is divided up by (milliseconds, or MACs);
    `begin`: {group: units} of a plan, from which a cut goes down to the budget; one in time is looked for at `below`, parts of what
    that costs, first, until so much of it is used (`near`).
    """

    network: nn.Module
    structure: Structure
    example: Tensor
    method: Method
    settings: PruneConfig
    job: Job[SlimConfig]
    place: Place | None = None
    cost: Cost | None = None
    begin: Mapping[str, int] | None = None
    below: Sequence[float] = BELOW
    near: float = NEAR

    @property
    def gradual(self) -> bool:
        """Whether it cuts while training."""
        return self.settings.gradual and self.job.config.finetune.epochs > 0

    @property
    def coupled(self) -> bool:
        """Whether Torch-Pruning cuts."""
        return self.method.pruner == "torch-pruning"

    def budget_at(self, budget: Budget, ratio: float) -> Budget:
        """`budget`, in measured time, as this ratio of the network's own cost, with the default floor."""
        whole = total_cost(self.structure, self.cost or macs)
        own = (
            dataclasses.replace(budget, latency_ratio=None, macs_ratio=ratio, reference_macs=whole)
            if self.cost is None
            else dataclasses.replace(budget, latency_ratio=ratio, reference_ms=whole)
        )
        return self.floored(own)

    def floored(self, budget: Budget) -> Budget:
        """The budget with the default of min_fraction, where the settings leave it open.

        Without a floor, importance per MAC empties early layers, and what they lost cannot be trained back.
        """
        if self.settings.min_fraction is not None:
            return budget
        here = not self.coupled and not self.gradual
        limits: list[tuple[Callable[[Budget], float], float]] = []
        evens = [budget.max_fraction / LEAST_FRACTION]
        if budget.memory_ratio is not None and here:
            limits.append((functools.partial(self.memory.least, self.structure), byte_limit(budget)))
            evens.append(budget.memory_ratio)
        if budget.name != "memory_ratio" or not here:
            target = resolve(self.structure, budget, self.cost, memory=here)
            limits.append((functools.partial(least_cost, self.structure, cost=target.cost), target.limit))
            evens.append(even_fraction(self.structure, budget, self.cost))
        floor = LEAST_FRACTION * min(evens)
        while floor > 0.01:
            own = dataclasses.replace(budget, min_fraction=floor)
            if all(least(own) <= limit for least, limit in limits):
                return own
            floor /= 2  # streams left whole cost so much that the rest must go lower
        return budget

    def once(self, network: nn.Module, budget: Budget, *, scores: Scores | None = None) -> nn.Module:
        """One cut of `network` (this one, or what is left of it), by importance measured on training images, and fitted.

        `scores`: known already, and the network's weights do not matter (its time is measured): nothing is fitted.
        """
        settings = self.settings
        origin = None if settings.min_fraction is None else self.structure.units  # a limit that was asked for
        here, ranked = self.job.here(network), scores
        example = self.given if here is self.network else self.example
        if ranked is None and network is self.network:
            ranked = self.scores  # measured once, also where a budget in time was looked for
        if self.coupled:
            smaller = prune_coupled(
                here, example, importance=settings.importance, isomorphic=self.method.isomorphic, budget=budget,
                data=self.job.batches, gradients=self.gradients if network is self.network else None, origin=origin,
                prove=scores is None, reconstruct=settings.reconstruct and scores is None,
            )  # fmt: skip
        else:
            cut = functools.partial(
                prune, here, example, budget=budget, data=self.job.batches if scores is None else None, cost=self.cost,
                rank=settings.rank, which=self.method.widths, reconstruct=settings.reconstruct and scores is None,
                lookahead=self.lookahead, origin=origin, prove=scores is None, begin=self.begin,
                nearest=self.place is None,
            )  # fmt: skip
            try:
                smaller = cut(importance=settings.importance if ranked is None else ranked)
            except NothingMatters:
                if network is self.network:
                    raise
                logger.warning("training left a network that says the same of every image; it is cut by magnitude")
                smaller = cut(importance="magnitude")
        return smaller.cpu()

    def check(self, *, once: bool = True) -> None:
        """Raise UnsupportedModel where this network cannot be cut in this way at all, whatever its weights; looks at two images.

        `once`: whether a network may be cut at once, although the settings say that it is cut while training.
        """
        settings = self.settings
        if self.coupled:
            check_coupled(self.network, self.structure, settings.importance, self.example)
        else:
            two = self.job.with_loss(list(self.job.data.train.batches(2, device=self.job.device, limit=2)))
            IMPORTANCES[settings.importance](self.network, self.structure, two)
        if settings.reconstruct and (once or not settings.gradual):
            with fitting():
                read_program(self.network, self.structure, self.example)

    def hook(
        self, budget: Budget, *, steps: int, epochs: int, meets: Callable[[nn.Module], float] | None = None
    ) -> GradualPruner:
        """The hook that cuts while training; `steps` and `epochs` of fine-tuning in all. ConfigError where a plan says the widths."""
        settings = self.settings
        if self.begin is not None:
            raise ConfigError("cuts while training do not go down from the widths of a plan; leave --gradual out")
        return GradualPruner(
            self.network, self.example, budget,
            every=between_cuts(settings.cut_fraction * steps, settings.cuts),
            prune_epochs=settings.cut_fraction * epochs, decay=settings.score_decay, cost=self.cost,
            rank=settings.rank, lookahead=self.lookahead, structure=self.structure, meets=meets,
        )  # fmt: skip

    def meeting(self, budget: Budget, first: Sequence[float] = ()) -> float:
        """The ratio for `budget_at` whose widths, as this network's importance chooses them now, were measured within the budget; `first`:
        where it is looked for, where something is known."""
        assert self.place is not None and budget.latency_ratio is not None

        def cut(ratio: float) -> nn.Module:
            own = self.budget_at(budget, ratio)
            if not self.gradual:
                return self.once(self.network, own, scores=self.scores)
            keep = allocate(
                self.structure, self.scores, own, self.cost, rank=self.settings.rank, lookahead=self.lookahead
            )
            return shrink(self.network, keep, self.structure)[0].cpu()

        if not first and self.begin is not None:
            first = [share * self.begun for share in self.below]
        return find_ratio(cut, self.least_ratio(budget), 0.999, budget.latency_ratio, self.place, first, self.near)

    @property
    def begun(self) -> float:
        """What the widths that a cut descends from cost, of the network's own cost."""
        meter = Meter(self.structure, self.cost or macs)
        return sum(meter.at(self.structure.units | dict(self.begin or {}))) / meter.total

    @cached_property
    def given(self) -> Given:
        """The example, tried with this network and read once for all its cuts."""
        return as_given(self.network, self.example)[1]

    @cached_property
    def memory(self) -> ActivationPeaks:
        """What its activations take at any widths."""
        return ActivationPeaks(self.network, self.structure, self.example)

    @cached_property
    def scores(self) -> Scores:
        """The importance of this network's channels, measured once for all cuts that are tried; none where Torch-Pruning scores."""
        if self.coupled:
            return {}
        return job_scores(self.job, self.network, self.structure, self.settings.importance)

    @cached_property
    def gradients(self) -> Mapping[str, Tensor] | None:
        """What Torch-Pruning's Taylor importance ranks this network's channels by, computed once for all its cuts; else None."""
        taylor = self.coupled and self.settings.importance == "taylor"
        return loss_gradients(self.network, self.job.batches) if taylor else None

    def check_memory(self, budget: Budget) -> None:
        """Raise InfeasibleBudget where the limits forbid a budget of memory, ConfigError where it cannot be asked of this method."""
        if budget.name == "memory_ratio" and self.settings.rank != "per_cost":
            raise ConfigError(
                f"a budget of memory goes by the peak, which --rank {self.settings.rank} does not know: leave it (or rm-slimming) out"
            )
        flat = {name: torch.ones(units) for name, units in self.structure.units.items()}
        alone = dataclasses.replace(budget, ratio=None, macs_ratio=None, latency_ratio=None)
        self.memory.allocate(self.structure, flat, self.floored(alone), uniform=self.method.widths == "uniform")

    def narrowest(self, budget: Budget) -> nn.Module:
        """The network of the least MACs that the limits of `budget` allow, whatever its weights."""
        own, budget = dataclasses.replace(self, cost=None), dataclasses.replace(budget, memory_ratio=None)
        flat = {name: torch.ones(units) for name, units in self.structure.units.items()}
        keep = allocate(self.structure, flat, own.budget_at(budget, own.least_ratio(budget)))
        return shrink(self.network, keep, self.structure)[0].cpu()

    def least_ratio(self, budget: Budget) -> float:
        """The least ratio (in steps of a twentieth) for `budget_at` that the limits allow. Raises InfeasibleBudget where all forbid it."""
        cost = self.cost or macs
        whole, ratio = total_cost(self.structure, cost), 0.01
        while least_cost(self.structure, self.budget_at(budget, ratio), cost) > ratio * whole:
            ratio *= 1.05
            if ratio >= 0.95:
                raise InfeasibleBudget(
                    f"latency_ratio={budget.latency_ratio:g} cannot be met: what these limits leave to be pruned saves next to nothing; "
                    "lower min_channels, min_fraction or round_to"
                )
        return ratio

    @property
    def lookahead(self) -> int:
        """Time is a staircase in the widths: a step may only pay together with the next ones."""
        return 1 if self.cost is None else 4


def job_scores(job: Job[SlimConfig], network: nn.Module, structure: Structure, importance: str) -> Scores:
    """The importance of a network's groups on the job's images, measured once for all networks of the same code, weights and groups."""
    members = {g.name: [(m.layer, m.side, m.size) for m in g.members] for g in structure.groups}
    asked = digest(network, {"importance": importance, "groups": members, "network": str(network)})
    if asked not in job.scored:
        job.scored[asked] = score_groups(importance, network, structure, job.batches)
    return job.scored[asked]


def make_cutter(
    network: nn.Module, method: Method, job: Job[SlimConfig], budget: Budget | None = None,
    widths: Mapping[str, int] | None = None, *, measured: bool = True,
) -> Cutter:  # fmt: skip
    """The method applied to this network (or its graph, see `find_prunable`), ready to measure a `budget` in time unless not `measured`.
    `widths`: of a plan, by layers."""
    settings = dataclasses.replace(job.config.prune, **method.settings)
    example = job.data.train.example(1)
    inner = method.widths == "inner"
    if method.pruner == "ours":
        settle = lambda structure, _: inner_only(structure) if inner else structure  # noqa: E731
        network, _, structure = find_prunable(network, as_tuple(network, example), budget, settle=settle)
    else:  # which cannot write sizes
        structure = find_structure(network, example)
    place = place_of(job) if measured and budget is not None and budget.latency_ratio is not None else None
    cost = None
    if place is not None and settings.cost == "time" and method.pruner == "ours":
        cost = TimeCost(layer_times(job, place), network, structure, example)
    begin = None if widths is None else SlimPlan(widths=widths).units(structure, strict=False)
    return Cutter(job.here(network), structure, example.to(job.device), method, settings, job, place, cost, begin)
