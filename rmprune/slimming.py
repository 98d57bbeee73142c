"""One trained network, slimmed by one method to one budget and fine-tuned. Files, records and order are the pipelines'."""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.config import PruneConfig, SlimConfig, TrainConfig
from rmprune.data import Dataset
from rmprune.errors import InfeasibleBudget
from rmprune.measure import count_macs
from rmprune.measure.latency_model import LatencyModel
from rmprune.methods import Method
from rmprune.pruning import Budget, GradualPruner, allocate, find_structure, prune, prune_coupled, shrink
from rmprune.pruning.baselines import inner_only
from rmprune.pruning.budget import even_fraction, least_cost, resolve
from rmprune.pruning.importance import score_groups
from rmprune.pruning.structure import Cost, Structure, macs, total_cost
from rmprune.pruning.time_cost import TimeCost
from rmprune.removal import remove_where_faster
from rmprune.rundir import write_text
from rmprune.timed import MARGIN, Place, find_ratio, infeasible
from rmprune.training import fit

logger = logging.getLogger("rmprune")
FLOOR = 0.5  # every layer keeps at least this part of what an even cut would leave it
TIME_ATTEMPTS = 5  # further cuts where the trained network misses its budget in measured time
NOISE = 1.1  # before training a budget is refused only where it is missed by more than this
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

    def once(self, network: nn.Module, budget: Budget) -> nn.Module:
        """One cut of `network` (this one, or what is left of it), by importance measured on training images."""
        settings, batches = self.settings, importance_batches(self.data)
        if self.method.torch_pruning:
            return prune_coupled(network, self.example, importance=settings.importance, budget=budget, data=batches)
        return prune(
            network,
            self.example,
            importance=settings.importance,
            budget=budget,
            data=batches,
            cost=self.cost,
            rank=settings.rank,
            which=self.method.which,
            lookahead=self.lookahead,
            origin=None if self.settings.min_fraction is None else self.structure.units,  # a limit that was asked for
        )

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
        scores = score_groups(self.settings.importance, self.network, self.structure, importance_batches(self.data))

        def cut(ratio: float) -> nn.Module:
            own = self.budget_at(budget, ratio)
            if not gradual:
                return self.once(self.network, own)
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


def slim_network(
    network: nn.Module,
    method: Method,
    budget: Budget,
    config: SlimConfig,
    data: Dataset,
    *,
    seed: int,
    device: torch.device,
    teacher: nn.Module,
    checkpoint: Path,
    log: Path,
    label: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Prune `network` to the budget and fine-tune it; all methods get the same number of epochs. On the CPU, in eval mode.

    With it the facts for its artifact and record: the residuals that `mixed` removed.
    Only a network that misses a budget in measured time at the end is cut again, with one epoch after each cut.
    """
    asked = budget
    example, measured = data.train.example(1), checkpoint.with_name(f"{label}-measured.json")
    timed = asked.latency_ratio is not None
    place = Place.first(config.measure, teacher, example) if timed or method.mixed else None
    cutter = make_cutter(network, method, config, data, place if timed else None)
    gradual = cutter.settings.gradual and config.finetune.epochs > 0
    meets: Callable[[nn.Module], float] | None = None
    if timed:
        assert place is not None and asked.latency_ratio is not None
        allowed = MARGIN * asked.latency_ratio
        found = remembered(measured, 0, functools.partial(cutter.meeting, budget, place, gradual))
        budget = cutter.budget_at(budget, found)
        meets = lambda network: place.ratio(network.cpu()) / allowed  # noqa: E731
    else:
        budget = cutter.floored(budget)
    hook = None
    if gradual:
        steps = data.train.num_batches(data.config.batch_size, shuffled=True) * config.finetune.epochs
        hook = cutter.hook(budget, steps=steps, epochs=config.finetune.epochs, meets=meets)
    else:  # after an interruption the same cut again gives the network that the checkpoint belongs to
        network = cutter.once(network, budget)

    def tune(network: nn.Module, train: TrainConfig, hook: GradualPruner | None, stage: str) -> nn.Module:
        return fit(
            network,
            data,
            train,
            seed=seed,
            device=device,
            hook=hook,
            teacher=teacher if train.distillation else None,
            checkpoint=checkpoint.with_name(f"{stage}.pt"),
            log=log,
            label=stage,
        ).cpu()

    network = tune(network, config.finetune, hook, label)
    once = dataclasses.replace(config.finetune, epochs=1, warmup_epochs=0.0)
    for attempt in range(1, TIME_ATTEMPTS + 2 if timed else 1):  # the promise is about the network as it was trained
        assert place is not None and asked.latency_ratio is not None
        take_time = functools.partial(place.ratio, network)
        ratio = remembered(measured, attempt, take_time) if attempt <= TIME_ATTEMPTS else take_time()
        if ratio <= asked.latency_ratio:
            logger.info("%s takes %.3f of the original's time on %s", label, ratio, place)
            break
        if attempt > TIME_ATTEMPTS:
            raise InfeasibleBudget(
                f"latency_ratio={asked.latency_ratio:g} was not met on {place} after {TIME_ATTEMPTS} further cuts; "
                "the machine may be busy with something else: run the same command again, or ask for a larger latency_ratio"
            )
        budget = scaled(budget, 0.97 * asked.latency_ratio / ratio)
        try:
            smaller = cutter.once(network, budget)
        except InfeasibleBudget:  # nothing left to cut: only a measurement that was off can help
            if (ratio := take_time()) <= asked.latency_ratio:
                break
            raise infeasible(asked.latency_ratio, ratio, place) from None
        logger.info("%s takes %.3f of the original's time, more than allowed: cut again", label, ratio)
        network = tune(smaller, once, None, f"{label}-again-{attempt}")
    if not method.mixed:
        return network, {}
    assert place is not None
    ratios = functools.partial(affordable, place, asked, example)
    network, removed = remove_where_faster(network, data.train.example(2), ratios)
    logger.info("%s: removed %s", label, ", ".join(removed) or "no residual, none made it faster")
    return network, {"removed": removed}


def affordable(place: Place, budget: Budget, example: Tensor, networks: Mapping[str, nn.Module]) -> dict[str, float]:
    """Time of each network relative to the original's; infinite where it has more MACs than the budget allows."""
    limit = math.inf if budget.macs_ratio is None else budget.macs_ratio * (budget.reference_macs or math.inf)
    return {
        name: ratio if count_macs(networks[name], example) <= limit else math.inf
        for name, ratio in place.ratios(networks).items()
    }


def scaled(budget: Budget, factor: float) -> Budget:
    """The budget times a factor, for a network that meets it: `max_fraction` must not cut what is left a second time."""
    return dataclasses.replace(budget, max_fraction=1.0, **{budget.name: getattr(budget, budget.name) * factor})


def remembered(file: Path, number: int, find: Callable[[], float]) -> float:
    """Figure `number` of a JSON list of measured ones; found and written where it is not there yet.

    Measured again after an interruption they would differ, and with them the networks that checkpoints belong to.
    """
    known = json.loads(file.read_text()) if file.is_file() else []
    if number >= len(known):
        known.append(find())
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(known))
    return float(known[number])


def importance_batches(data: Dataset) -> list[tuple[Tensor, Tensor]]:
    """The training images that a one-cut importance is measured on."""
    return list(data.train.batches(128, limit=IMPORTANCE_IMAGES))


def check_budgets(
    networks: Callable[[bool], nn.Module],
    methods: dict[str, Method],
    budgets: list[Budget],
    config: SlimConfig,
    data: Dataset,
) -> None:
    """Raise InfeasibleBudget before any training where limits forbid a budget. `networks(plain)` gives one with random weights."""
    place = Place.first(config.measure, networks(False), data.train.example(1))
    for method in methods.values():
        cutter = make_cutter(networks(method.plain), method, config, data)
        for budget in budgets:
            if budget.latency_ratio is None:
                cutter.hook(cutter.floored(budget), steps=1, epochs=1)
            elif (least := place.ratio(cutter.narrowest(budget))) > NOISE * budget.latency_ratio:
                raise infeasible(budget.latency_ratio, least, place)
