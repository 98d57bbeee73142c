"""One trained network, slimmed by one method to one budget and fine-tuned. Files, records and order are the pipelines'."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmprune.config import SlimConfig, TrainConfig
from rmprune.data.load import Dataset
from rmprune.errors import InfeasibleBudget, MissedBudget
from rmprune.measure import count_macs
from rmprune.measure.place import MARGIN, Place, infeasible
from rmprune.methods.cutter import Cutter, make_cutter
from rmprune.methods.table import Method
from rmprune.pruning import Budget, GradualPruner
from rmprune.removal import remove_where_faster
from rmprune.runs.notes import remembered
from rmprune.training import fit

logger = logging.getLogger("rmprune")
TIME_ATTEMPTS = 5  # further cuts where the trained network misses its budget in measured time


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
    teacher_memory: Path,
    checkpoint: Path,
    log: Path,
    label: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Prune `network` to the budget and fine-tune it; all methods get the same number of epochs. On the CPU, in eval mode.

    With it the facts for its artifact and record: which residuals `mixed` removed.
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
        meets = lambda network: place.ratio(network.cpu()) / allowed  # noqa: E731
    budget = met(budget, cutter, place, measured, gradual=gradual)
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
            teacher=teacher,
            teacher_memory=teacher_memory,
            checkpoint=checkpoint.with_name(f"{stage}.pt"),
            log=log,
            label=stage,
        ).cpu()

    network = tune(network, config.finetune, hook, label)
    once = dataclasses.replace(config.finetune, epochs=1, warmup_epochs=0.0)
    for attempt in range(1, TIME_ATTEMPTS + 2 if timed else 1):  # the promise is about the network as it was trained
        assert place is not None and asked.latency_ratio is not None
        take_time = functools.partial(place.least_ratio, network, asked.latency_ratio)
        ratio = remembered(measured, f"after cut {attempt}", take_time) if attempt <= TIME_ATTEMPTS else take_time()
        if ratio <= asked.latency_ratio:
            logger.info("%s takes %.3f of the original's time on %s", label, ratio, place)
            break
        if attempt > TIME_ATTEMPTS:
            raise MissedBudget(
                f"latency_ratio={asked.latency_ratio:g} was not met on {place} after {TIME_ATTEMPTS} further cuts; "
                "the machine may be busy with something else: run the same command again, or ask for a larger latency_ratio"
            )
        budget = scaled(budget, 0.97 * asked.latency_ratio / ratio)
        try:
            smaller = cutter.once(network, budget)
        except InfeasibleBudget:  # nothing left to cut: only a measurement that was off can help
            if (ratio := take_time()) <= asked.latency_ratio:
                break
            raise MissedBudget(str(infeasible(asked.latency_ratio, ratio, place))) from None
        logger.info("%s takes %.3f of the original's time, more than allowed: cut again", label, ratio)
        network = tune(smaller, once, None, f"{label}-again-{attempt}")
    if not method.mixed:
        return network, {}
    assert place is not None
    limit = math.inf if asked.macs_ratio is None else asked.macs_ratio * (asked.reference_macs or math.inf)
    removal = remove_where_faster(
        network, data.train.example(2), place.ratios, lambda network: count_macs(network, example) <= limit
    )
    logger.info("%s: removed %s", label, ", ".join(removal.removed) or "no residual, none made it faster")
    return removal.model, {"removal": removal.facts}


def met(budget: Budget, cutter: Cutter, place: Place | None, measured: Path, *, gradual: bool = False) -> Budget:
    """What the cutter must be told so that the budget is met; one in measured time is looked for by measuring (`measured`: its memory)."""
    if budget.latency_ratio is None:
        return cutter.floored(budget)
    assert place is not None
    return cutter.budget_at(
        budget, remembered(measured, "before", functools.partial(cutter.meeting, budget, place, gradual))
    )


def scaled(budget: Budget, factor: float) -> Budget:
    """The budget times a factor, for a network that meets it: `max_fraction` must not cut what is left a second time."""
    return dataclasses.replace(budget, max_fraction=1.0, **{budget.name: getattr(budget, budget.name) * factor})
