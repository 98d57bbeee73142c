"""`amc`: train MobileNetV2, remove residuals and fuse, choose widths, fine-tune, measure, record.

A run is a directory, laid out as `slim`'s: with one seed and one budget it is the cell itself; with more, `seed0/` holds
`dense/` and `plain/`, and `seed0/macs_ratio-0.5/` is a cell with its record, a directory for each method's network
(`rm-amc/`, ...) and `search/METHOD/` (state and episodes of the search).
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rmprune import artifact
from rmprune.amc.choose import Goal, Timing, choose, make_space, whole_cost
from rmprune.amc.multiplier import require_multiplier, width_multiplier
from rmprune.amc.search import SEARCHES, SearchResult
from rmprune.amc.table import AMC_METHODS
from rmprune.artifact.describe import describe
from rmprune.config import AmcConfig
from rmprune.data.load import Load, load_dataset
from rmprune.errors import ConfigError
from rmprune.graph.network import flat_name
from rmprune.measure import check_available
from rmprune.measure.place import Place
from rmprune.methods.slim import remove_faster
from rmprune.pipelines.narrower import narrower
from rmprune.pipelines.stages import (
    at_work,
    dense_network,
    finish,
    make_dense,
    open_data,
    pick_device,
    say,
    stage,
    starting_network,
    with_names,
)
from rmprune.pipelines.unread import warn_unread
from rmprune.pruning.carry_out import carry_out_plan_blocks
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.gradual import PolicyPruner, between_cuts
from rmprune.pruning.plan import SlimPlan, layers_digest
from rmprune.pruning.program import read_program
from rmprune.pruning.refit import fitting
from rmprune.removal import Removal, remove_residuals
from rmprune.runs.cells import Cell, plan_cells, unfinished
from rmprune.runs.directory import refuse_used
from rmprune.runs.progress import progress
from rmprune.training.job import Files, Job, tune

logger = logging.getLogger("rmprune")
GRADUAL_CUTS = 20  # small cuts in which a policy is reached while training


def run_amc(config: AmcConfig, *, command: str, load: Load = load_dataset) -> list[Path]:
    """Do the whole job and return the records. Goes on where an interrupted run of the same settings was. Raises ConfigError for an unknown
    method, or a search without a decision of its own."""
    for name in config.method:
        if name not in AMC_METHODS:
            raise ConfigError(f"unknown method {name!r}; there are: {', '.join(AMC_METHODS)}")
        if AMC_METHODS[name].search == "agent" and config.search.episodes <= config.search.warm_up:
            raise ConfigError(
                f"{name}: all {config.search.episodes} episodes are random, as warm_up is {config.search.warm_up}; "
                "give more --episodes or a smaller --warm-up, or use a method with random search"
            )
    budgets = [(f"{config.search.constraint}_ratio", value) for value in config.search.budget]
    cells = plan_cells(config.directory, config.seed, config.seeds, budgets)
    found, networks = [cell.record for cell in cells], {"dense", "plain", "planned", *AMC_METHODS}
    plan = None if config.plan is None else SlimPlan.read(config.plan)
    refuse_used(config.directory, config, found, overwrite=config.overwrite)
    device = pick_device(config.device)
    data = open_data(config, load)
    job = Job(config, data, device, config.seed)
    _refuse_early(job, plan)
    warn_unread(config)
    with at_work(job, found, networks):
        for cell in unfinished(cells):
            _run_cell(cell, plan, replace(job, seed=cell.seed), command)
    return found


def _refuse_early(job: Job[AmcConfig], plan: SlimPlan | None) -> None:
    """Infeasible budgets are refused before a file is written or an epoch trained (measured time: once it is measured)."""
    config, example = job.config, job.data.train.example(2)
    check_available(config.measure.backends, config.measure.device)
    dense = make_dense(config, job.data, job.seed)
    describe(dense)
    if "uniform" in config.method:
        require_multiplier(config)
        if config.weights is not None:
            raise ConfigError(
                "uniform trains narrower networks, which the weights do not fit; leave the method or --weights out"
            )
    starts = {AMC_METHODS[name].start for name in config.method if AMC_METHODS[name].search is not None}
    networks = [dense] if "dense" in starts else []
    if "plain" in starts:
        networks.append(remove_residuals(dense, example, **vars(config.removal)).model)
    if plan is not None:
        networks.append(carry_out_plan_blocks(dense, plan, lambda count: example[:count], config.removal)[0])
    for network in networks:
        with fitting("amc scores widths by fits: slim --method residual --no-reconstruct prunes without"):
            read_program(network, find_structure(network, example), example)
    if config.search.constraint == "latency":
        return
    for ratio in config.search.budget:
        if any(AMC_METHODS[name].search is None for name in config.method):
            make = functools.partial(make_dense, config, job.data, job.seed)
            width_multiplier(make, dense, example, config, Goal(ratio))
        for network in networks:
            make_space(network, dense, example, config.search, ratio)


def _run_cell(cell: Cell, plan: SlimPlan | None, job: Job[AmcConfig], command: str) -> None:
    """Every stage that is not done yet, then the record."""
    config, example = job.config, job.data.train.example(2)
    dense = dense_network(job, cell)
    job = replace(job, teacher=dense, memory=cell.shared / "checkpoint" / "teacher")
    networks: dict[str, nn.Module] = {"original": dense}
    bases = {"dense": dense}
    if any(AMC_METHODS[name].start == "plain" for name in config.method):
        networks["plain"] = bases["plain"] = starting_network(job, cell, "plain")
    if plan is not None:
        bases["planned"] = _planned(plan, job, cell)
    timing = None
    if config.search.constraint == "latency":
        timing = Timing(dense, example, config.measure, cache=cell.shared / "latency.json")
    for name in config.method:
        goal = Goal(cell.value, timing, cell.directory / "search" / name)
        base = bases[AMC_METHODS[name].start]
        work: Callable[..., Any] = _narrow if AMC_METHODS[name].search is None else functools.partial(_slim, base)
        made = functools.partial(work, name, goal, job, cell)
        networks[name] = stage(cell.directory / name, made, onnx=example[:1])
    finish(job, cell, command, networks, methods=list(config.method))


def _planned(plan: SlimPlan, job: Job[AmcConfig], cell: Cell) -> nn.Module:
    """The trained network with its blocks as planned and its widths whole, which a seed's cells share."""

    def make() -> tuple[nn.Module, dict[str, Any]]:
        found, facts = carry_out_plan_blocks(with_names(job.original, job), plan, job.examples, job.config.removal)
        say(facts)
        return found, facts

    return stage(cell.shared / "planned", make, onnx=job.data.train.example(1))


def _slim(base: nn.Module, name: str, goal: Goal, job: Job[AmcConfig], cell: Cell) -> tuple[nn.Module, dict[str, Any]]:
    """A method's network, trained to its end, and what its search found."""
    config, search, example = job.config, AMC_METHODS[name].search, job.data.train.example(2)
    assert search is not None and goal.directory is not None
    if goal.timing is None:
        space = make_space(base, job.original, example, config.search, goal.ratio)
    else:
        space = goal.timing.space(base, config.search, goal.ratio, goal.directory / "budget.json")
    episodes = 1 if search == "uniform" else config.search.episodes
    done, label = 0, f"{name}: {SEARCHES[search].split(',')[0]}"
    with progress(label, episodes) as advance:

        def watch(result: SearchResult) -> None:
            nonlocal done
            best = result.best
            said = f"best reward {best.reward:.4f} at {100 * best.cost / space.budget:.0f} % of the budget"
            advance(len(result.episodes) - done, said)
            done = len(result.episodes)
            if done == episodes:
                logger.info("%s  %s  (%d episodes, %.0f s)", label, said, done, result.seconds)

        chosen = choose(base, space, search, job, goal, watch)
    network, hook = base, None
    if config.apply == "gradual" and config.finetune.epochs > 0:
        every = between_cuts(job.data.steps_per_epoch * config.prune_epochs, GRADUAL_CUTS)
        hook = PolicyPruner(base, example, chosen.widths, prune_epochs=config.prune_epochs, every=every)
    else:
        network = job.ready(chosen.model)
    network = tune(network, config.finetune, job, Files.of(cell.directory, name), hook)
    if hook is not None:
        chosen.facts["cut_error"] = max(chosen.facts["cut_error"], hook.proved(network))
    if AMC_METHODS[name].start == "planned":
        begun = artifact.read_extra(cell.shared / "planned")
        widths = {flat_name(group): width for group, width in chosen.widths.items()}
        plan = SlimPlan(begun["blocks"], widths, begun["fuse"], layers_digest(job.original))
        return network, {"search": chosen.facts, "plan": plan.to_dict()}
    if not AMC_METHODS[name].mixed:
        return network, {"search": chosen.facts}
    removal = _remove_faster(network, name, goal, job)
    return removal.model, {"search": chosen.facts, "removal": removal.facts}


def _remove_faster(network: nn.Module, name: str, goal: Goal, job: Job[AmcConfig]) -> Removal:
    """`remove_faster` under a budget in MACs or parameters; one in time is met where the network becomes faster."""
    example, constraint = job.data.train.example(1), job.config.search.constraint
    place = goal.timing.place if goal.timing else Place.first(job.config.measure, job.original, example)

    def fits(network: nn.Module) -> bool:
        if constraint == "latency":
            return True
        own, whole = (whole_cost(model, example, constraint) for model in (network, job.original))
        return own <= goal.ratio * whole

    settings = replace(job.config.removal, fuse="cheaper")  # one that was cut becomes faster, not MobileNetV1
    return remove_faster(network, job, place, fits, settings, name)


def _narrow(name: str, goal: Goal, job: Job[AmcConfig], cell: Cell) -> tuple[nn.Module, dict[str, Any]]:
    """`narrower`, by the network's own multiplier."""
    assert goal.directory is not None
    find = functools.partial(
        width_multiplier, original=job.original, example=job.data.train.example(2), config=job.config, goal=goal
    )
    files, note = Files.of(cell.directory, name), goal.directory / "multiplier.json"
    network, facts = narrower(job, files, note, "multiplier", find)
    return network, {"search": {"method": "width multiplier"} | facts}
