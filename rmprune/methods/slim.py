"""One trained network, slimmed by one method to one budget and fine-tuned. Files, records and order are the pipelines'."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rmprune.config import RemovalConfig, SlimConfig
from rmprune.errors import InfeasibleBudget
from rmprune.graph.facts import facts_of
from rmprune.measure import activation_memory, count_macs
from rmprune.measure.place import MARGIN, NEAR, Place, infeasible
from rmprune.methods.costs import place_of
from rmprune.methods.cutter import ROUGH, Cutter, make_cutter
from rmprune.methods.table import Method
from rmprune.pruning import Budget
from rmprune.pruning.carry_out import widths_of
from rmprune.pruning.peak_memory import byte_limit
from rmprune.pruning.prove import prove_groups
from rmprune.removal import Removal, remove_where_faster
from rmprune.runs.notes import read_notes, remembered
from rmprune.training.job import Files, Job, tune

logger = logging.getLogger("rmprune")
TIME_ATTEMPTS = 5  # further cuts, at most, where the trained network misses its budget in measured time


def slim_network(
    network: nn.Module, method: Method, budget: Budget, job: Job[SlimConfig], files: Files,
    widths: Mapping[str, int] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """Prune `network` to the budget and fine-tune it; all methods get the same number of epochs. On the CPU, in eval mode.
    `widths`: of a plan, by layers, from which it is cut to the budget.

    With it the facts for its artifact and record: the error of cuts of its groups (`prove_groups`) and of the last network, the units that
    each still has (`widths_of`), which residuals `mixed` removed. Only a network that misses a budget in measured time at the end is cut
    again, up to TIME_ATTEMPTS times, with one epoch after each cut. Raises InfeasibleBudget where limits forbid the budget or even these
    cuts do not meet it, UnsupportedModel where the method cannot cut this network.
    """
    config, data = job.config, job.data
    timed = budget.latency_ratio is not None
    cutter = make_cutter(network, method, job, budget, widths)
    facts: dict[str, Any] = {"cut_error": prove_groups(cutter.network, cutter.structure, cutter.example)}
    cut_to = met(budget, cutter, files)
    network, hook = cutter.network, None
    if cutter.gradual:
        steps = data.steps_per_epoch * config.finetune.epochs
        meets = functools.partial(_excess, cutter, budget) if timed else None
        hook = cutter.hook(cut_to, steps=steps, epochs=config.finetune.epochs, meets=meets)
    else:  # after an interruption the same cut again gives the network that the checkpoint belongs to
        network = job.ready(cutter.once(network, cut_to))
    network = tune(network, config.finetune, job, files, hook)
    if hook is not None:
        hook.proved(network)  # once more, as it was trained to its end: a checkpoint holds no facts
    if timed:
        network = _within_time(network, cutter, budget, cut_to, files)
    facts["cut_error"] = max(facts["cut_error"], facts_of(network).get("cut_error") or 0.0)
    facts["widths"] = widths_of(cutter.structure, network)
    if not method.faster:
        return network, facts
    limit = math.inf if budget.macs_ratio is None else budget.macs_ratio * (budget.reference_macs or math.inf)
    example, most = data.train.example(1), byte_limit(budget)

    def fits(network: nn.Module) -> bool:
        peak = 0.0 if most == math.inf else activation_memory(network, example).peak_bytes
        return count_macs(network, example) <= limit and peak <= most

    removal = remove_faster(network, job, place_of(job), fits, config.removal, files.label)
    return removal.model, facts | {"removal": removal.facts}


def remove_faster(
    network: nn.Module, job: Job[Any], place: Place, fits: Callable[[nn.Module], bool], settings: RemovalConfig,
    label: str,
) -> Removal:  # fmt: skip
    """RM for those residuals of a trained network whose removal makes it faster on `place` and leaves it within a budget (`fits`)."""
    settings = dataclasses.replace(settings, ranges="provable")  # nothing is trained after it
    removal = remove_where_faster(network, job.data.train.example(2), place.ratios, fits, **vars(settings))
    why = "; ".join(dict.fromkeys(removal.kept.values())) or "there is none"
    logger.info("%s: removed %s", label, ", ".join(removal.removed) or f"no residual ({why})")
    return removal


def met(budget: Budget, cutter: Cutter, files: Files) -> Budget:
    """What the cutter must be told so that the budget is met. One in measured time is looked for by measuring, once for these files (and
    once more for what goes on, where it was looked for roughly, from there on)."""
    if budget.latency_ratio is None:
        return cutter.floored(budget)
    note, key = files.note("measured"), "before" if cutter.near == NEAR else "roughly"
    rough = read_notes(note).get("roughly")
    find = functools.partial(cutter.meeting, budget, [] if rough is None else [rough, rough * NEAR / ROUGH])
    return cutter.budget_at(budget, remembered(note, key, find))


def _excess(cutter: Cutter, budget: Budget, network: nn.Module) -> float:
    """The network's time relative to the budget, of which a little is kept in hand."""
    assert cutter.place is not None and budget.latency_ratio is not None
    return cutter.place.ratio(network.cpu()) / (MARGIN * budget.latency_ratio)


def _within_time(network: nn.Module, cutter: Cutter, budget: Budget, cut_to: Budget, files: Files) -> nn.Module:
    """The trained network, or one cut and trained further, that was measured within the budget: the promise is about what was trained."""
    place, allowed, label = cutter.place, budget.latency_ratio, files.label
    assert place is not None and allowed is not None
    once = dataclasses.replace(cutter.job.config.finetune, epochs=1, warmup_epochs=0.0)
    for attempt in range(1, TIME_ATTEMPTS + 2):
        take_time = functools.partial(place.least_ratio, network, allowed)
        last = attempt > TIME_ATTEMPTS  # measured anew each time the same command is run
        ratio = take_time() if last else remembered(files.note("measured"), f"after cut {attempt}", take_time)
        if ratio <= allowed:
            logger.info("%s takes %.3f of the original's time on %s", label, ratio, place)
            return network
        if last:
            break
        cut_to = scaled(cut_to, 0.97 * allowed / ratio)
        try:
            smaller = cutter.once(network, cut_to)
        except InfeasibleBudget:  # nothing left to cut: only a measurement that was off can help
            if (ratio := take_time()) <= allowed:
                return network
            raise infeasible(allowed, ratio, place) from None
        logger.info("%s takes %.3f of the original's time, more than allowed: cut again", label, ratio)
        network = tune(cutter.job.ready(smaller), once, cutter.job, files.named(f"{label}-again-{attempt}"))
    raise InfeasibleBudget(
        f"latency_ratio={allowed:g} was not met on {place} after {TIME_ATTEMPTS} further cuts; "
        "the machine may be busy with something else: run the same command again, or ask for a larger latency_ratio"
    )


def scaled(budget: Budget, factor: float) -> Budget:
    """The budget times a factor, for a network that meets it: `max_fraction` must not cut what is left a second time."""
    changed: dict[str, Any] = {"max_fraction": 1.0, budget.name: budget.value * factor}
    return dataclasses.replace(budget, **changed)
