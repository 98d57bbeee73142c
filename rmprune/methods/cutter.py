"""How one method cuts one network: its budget, one cut, or the hook that cuts while training. Trains and measures nothing itself."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmprune.config import PruneConfig, SlimConfig
from rmprune.data.load import Dataset
from rmprune.errors import InfeasibleBudget
from rmprune.measure.latency_model import LatencyModel
from rmprune.measure.place import Place, find_ratio
from rmprune.methods.table import Method
from rmprune.pruning import Budget, GradualPruner, allocate, find_structure, prune, prune_coupled, shrink
from rmprune.pruning.allocate import even_fraction, least_cost
from rmprune.pruning.budget import resolve
from rmprune.pruning.coupled import check_coupled
from rmprune.pruning.groups import Cost, Scores, Structure, inner_only, macs, total_cost
from rmprune.pruning.importance import IMPORTANCES, score_groups
from rmprune.pruning.one_shot import fitting
from rmprune.pruning.program import read_program
from rmprune.pruning.time_cost import TimeCost

FLOOR = 0.5  # every layer keeps at least this part of what an even cut would leave it
IMPORTANCE_IMAGES = 2048  # training images that a one-cut importance is measured on


@dataclass(frozen=True)
class Cutter:
    """How one method cuts one network. `cost`: what a budget in measured time is divided up by (milliseconds, or MACs)."""

    network: nn.Module
    structure: Structure
    example: Tensor
    method: Method
    settings: PruneConfig
    data: Dataset
    cost: Cost | None = None

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
        target = resolve(self.structure, budget, self.cost)
        floor = min(FLOOR * even_fraction(self.structure, budget, self.cost), budget.max_fraction)
        while floor > 0.01:
            own = dataclasses.replace(budget, min_fraction=floor)
            if least_cost(self.structure, own, target.cost) <= target.limit:
                return own
            floor /= 2  # streams left whole cost so much that the rest must go lower
        return budget

    def once(self, network: nn.Module, budget: Budget, *, scores: Scores | None = None) -> nn.Module:
        """One cut of `network` (this one, or what is left of it), by importance measured on training images.

        `scores`: known already, and the network's weights do not matter (its time is measured): nothing is fitted.
        """
        settings = self.settings
        origin = None if settings.min_fraction is None else self.structure.units  # a limit that was asked for
        if self.method.torch_pruning:
            return prune_coupled(
                network,
                self.example,
                importance=settings.importance,
                budget=budget,
                data=importance_batches(self.data),
                origin=origin,
            )
        return prune(
            network,
            self.example,
            importance=settings.importance if scores is None else scores,
            budget=budget,
            data=importance_batches(self.data) if scores is None else None,
            cost=self.cost,
            rank=settings.rank,
            which=self.method.which,
            reconstruct=settings.reconstruct and scores is None,
            lookahead=self.lookahead,
            origin=origin,
        )

    def check(self, *, once: bool = True) -> None:
        """Raise UnsupportedModel where this network cannot be cut in this way at all, whatever its weights; looks at two images.

        `once`: whether a network may be cut at once, although the settings say that it is cut while training.
        """
        settings = self.settings
        if self.method.torch_pruning:
            check_coupled(self.network, self.structure, settings.importance, self.example)
            return
        IMPORTANCES[settings.importance](self.network, self.structure, list(self.data.train.batches(2, limit=2)))
        if settings.reconstruct and (once or not settings.gradual):
            with fitting():
                read_program(self.network, self.structure, self.example)

    def hook(
        self, budget: Budget, *, steps: int, epochs: int, meets: Callable[[nn.Module], float] | None = None
    ) -> GradualPruner:
        """The hook that cuts while training; `steps` and `epochs` of fine-tuning in all."""
        settings = self.settings
        return GradualPruner(
            self.network,
            self.example,
            budget,
            every=max(1, round(settings.cut_fraction * steps / settings.cuts)),
            prune_epochs=settings.cut_fraction * epochs,
            decay=settings.score_decay,
            cost=self.cost,
            rank=settings.rank,
            lookahead=self.lookahead,
            structure=self.structure,
            meets=meets,
        )

    def meeting(self, budget: Budget, place: Place, gradual: bool) -> float:
        """The ratio for `budget_at` whose widths, as this network's importance chooses them now, were measured within the budget."""
        assert budget.latency_ratio is not None
        scores: Scores = {}
        if not self.method.torch_pruning:  # which scores by itself
            batches = importance_batches(self.data)
            scores = score_groups(self.settings.importance, self.network, self.structure, batches)

        def cut(ratio: float) -> nn.Module:
            own = self.budget_at(budget, ratio)
            if not gradual:
                return self.once(self.network, own, scores=scores)
            keep = allocate(self.structure, scores, own, self.cost, rank=self.settings.rank, lookahead=self.lookahead)
            return shrink(self.network, keep, self.structure)[0]

        return find_ratio(cut, self.least_ratio(budget), 0.999, budget.latency_ratio, place)

    def narrowest(self, budget: Budget) -> nn.Module:
        """The network of the least MACs that the limits of `budget` allow, whatever its weights."""
        own = dataclasses.replace(self, cost=None)
        flat = {name: torch.ones(units) for name, units in self.structure.units.items()}
        keep = allocate(self.structure, flat, own.budget_at(budget, own.least_ratio(budget)))
        return shrink(self.network, keep, self.structure)[0]

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


def make_cutter(
    network: nn.Module, method: Method, config: SlimConfig, data: Dataset, place: Place | None = None
) -> Cutter:
    """The method applied to this network. `place`: where time counts, for budgets in measured time."""
    settings = dataclasses.replace(config.prune, **method.settings)
    example = data.train.example(1)
    structure = find_structure(network, example)
    if method.which == "inner":
        structure = inner_only(structure)
    cost = None
    if place is not None and settings.cost == "time" and not method.torch_pruning:
        cache = config.directory / f"layer-times-{place.backend}-{place.threads}-{place.batch_size}.json"
        table = LatencyModel(place.backend, threads=place.threads, batch_size=place.batch_size, cache=cache)
        cost = TimeCost(table, network, structure, example)
    return Cutter(network, structure, example, method, settings, data, cost)


def importance_batches(data: Dataset) -> list[tuple[Tensor, Tensor]]:
    """The training images that a one-cut importance is measured on."""
    return list(data.train.batches(128, limit=IMPORTANCE_IMAGES))
