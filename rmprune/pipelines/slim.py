"""`slim`: train sparse, remove residuals (all of them, or where that pays), prune, fine-tune, measure, record.

A run is a directory. With one seed and one budget it is the cell itself; with more, `seed0/` holds what the cells of a seed share
(`dense/`, `plain/`) and `seed0/macs_ratio-0.5/` is a cell. Every stage leaves an artifact; what is there is not done again.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rmprune import artifact
from rmprune.artifact.describe import describe
from rmprune.config import MeasureConfig, SlimConfig
from rmprune.data.load import Load, load_dataset
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.measure import check_available, count_macs
from rmprune.methods import auto, depth, outlook, scratch
from rmprune.methods.choose import best, judge
from rmprune.methods.cutter import Cutter, make_cutter
from rmprune.methods.refuse import Refusal, Starts, check_budgets, refusal, skip
from rmprune.methods.slim import slim_network
from rmprune.methods.start import start
from rmprune.methods.table import METHODS, STARTS, Method, find_methods, network_name
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
from rmprune.pruning import Budget
from rmprune.pruning.carry_out import carry_out
from rmprune.pruning.importance import NothingMatters
from rmprune.pruning.peak_memory import with_reference
from rmprune.pruning.plan import SlimPlan, layers_digest
from rmprune.removal import plan_removal
from rmprune.runs.cells import Cell, plan_cells, unfinished
from rmprune.runs.directory import refuse_used
from rmprune.runs.records import RENAMED
from rmprune.training.job import Files, Job, tune

logger = logging.getLogger("rmprune")


def run_slim(config: SlimConfig, *, command: str, load: Load = load_dataset) -> list[Path]:
    """Do the main job and return the records. Goes on where an interrupted run of the same settings was."""
    find_methods(config.method)
    device = pick_device(config.device)
    return run_job(Job(config, open_data(config, load), device, config.seed), command=command)


def run_job(job: Job[SlimConfig], *, command: str) -> list[Path]:
    """The same for data that are open already, and perhaps a network that was trained elsewhere."""
    config = job.config
    methods = find_methods(config.method)
    plan = None if config.plan is None else SlimPlan.read(config.plan)
    budgets, memory = config.prune.budgets or [("", 0.0)], config.prune.memory_beside
    cells = plan_cells(config.directory, config.seed, config.seeds, budgets, memory)
    networks = {"dense", "pruned", *STARTS, *METHODS, *RENAMED}
    found = [cell.record for cell in cells]
    refuse_used(config.directory, config, found, overwrite=config.overwrite)
    refuse_early(methods, plan, job)
    warn_unread(config)
    refused: list[InfeasibleBudget] = []
    with at_work(job, found, networks):
        for cell in unfinished(cells):
            try:
                run_cell(cell, methods, plan, replace(job, seed=cell.seed), command)
            except InfeasibleBudget as error:
                if not config.skip_infeasible:
                    raise
                logger.warning("%s %g, seed %d, is left out: %s", cell.kind, cell.value, cell.seed, error)
                refused.append(error)
    if len(refused) == len(cells):
        raise refused[0]
    return [record for record in found if record.exists()]


def refuse_early(methods: dict[str, Method], plan: SlimPlan | None, job: Job[SlimConfig]) -> None:
    """Everything that can be refused is refused before a file is written or an epoch trained."""
    config = job.config
    check_available(config.measure.backends, config.measure.device)
    for name, method in methods.items():
        if method.candidates and config.prune.ratio:
            raise ConfigError(
                f"{name} compares networks of equal cost, which --ratio does not give; use --macs-ratio or --latency-ratio"
            )
        if (method.scratch or method.depth) and config.prune.ratio:
            raise ConfigError(
                f"{name} has no channels to remove, which --ratio counts; use --macs-ratio, --latency-ratio or --memory-ratio"
            )
    example = job.data.train.example(2)
    dense = job.given or make_dense(config, job.data, job.seed)
    describe(dense)
    if config.removal.keep:  # of the original's blocks, whatever the methods make of them
        plan_removal(dense, example, **vars(config.removal))
    if plan is not None:
        two = [(example, torch.zeros(2, dtype=torch.long))]
        with contextlib.suppress(NothingMatters):  # of weights that are not trained yet
            carry_out(
                dense,
                plan,
                two,
                importance=config.prune.importance,
                reconstruct=config.prune.reconstruct,
                removal=config.removal,
            )
        return
    reference = count_macs(dense, example[:1])
    budgets = [
        with_reference(Budget.from_config(config.prune, *budget, reference_macs=reference), dense, example)
        for budget in config.prune.budgets
    ]

    @functools.cache
    def network(name: str) -> nn.Module:
        return start(dense, name, lambda images: example[:images], config.removal)[0]

    job = replace(job, teacher=dense)
    searches: dict[str, Callable[[Budget], object]] = {
        "auto": functools.partial(outlook.refuse, dense, job=job),
        "depth": functools.partial(depth.check_depth, dense, job=job),
    }
    if any(method.scratch for method in methods.values()):
        scratch.own_width(job)
        make = functools.partial(make_dense, config, job.data, job.seed)
        searches["scratch"] = functools.partial(scratch.check_narrowest, make, job=job)
    check_budgets(network, methods, budgets, job, searches)


def starts_of(job: Job[SlimConfig], cell: Cell) -> Starts:
    """The networks that methods start from, by their names, which the cells of a seed share; the job's teacher is the trained one."""
    return functools.cache(functools.partial(starting_network, job, cell))


def run_cell(
    cell: Cell, methods: dict[str, Method], plan: SlimPlan | None, job: Job[SlimConfig], command: str,
    measure: MeasureConfig | None = None,
) -> None:  # fmt: skip
    """Every stage of a cell that is not done yet, then its record; `measure`: how long for that, where not as the settings say."""
    config, example = job.config, job.data.train.example(1)
    dense = dense_network(job, cell)
    memory = None if job.given else cell.shared / "checkpoint" / "teacher"  # others' batches may differ each time
    job = replace(job, teacher=dense, memory=memory)
    starts = starts_of(job, cell)
    for name in sorted({method.start for method in methods.values()}):
        starts(name)
    networks: dict[str, nn.Module] = {"original": dense}
    if any(method.start == "plain" for method in methods.values()):
        networks["plain"] = starts("plain")
    if plan is not None:
        networks["plan"] = stage(cell.directory / "plan", functools.partial(_planned, plan, job, cell), onnx=example)
        finish(job, cell, command, networks, methods=["plan"])
        return
    refused: dict[str, Refusal] = {}
    budget = Budget.from_config(config.prune, cell.kind, cell.value, reference_macs=count_macs(dense, example))
    budget = with_reference(budget, dense, example)
    for name, method in methods.items():
        key = network_name(name, methods)
        make = functools.partial(_slim, name, method, budget, job, cell, starts)
        try:
            networks[key] = stage(cell.directory / key, make, onnx=example)
        except InfeasibleBudget as error:
            skip(name, error, config)
            refused[name] = error
    if len(refused) == len(methods):
        raise refusal("no method can be had", refused)
    done = [name for name in methods if name not in refused]
    reasons = {name: str(error) for name, error in refused.items()}
    finish(job, cell, command, networks, methods=done, refused=reasons, measure=measure)


def _planned(plan: SlimPlan, job: Job[SlimConfig], cell: Cell) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a plan, trained to its end, and the facts for its artifact and record."""
    config, dense = job.config, job.here(with_names(job.original, job))
    network, facts = carry_out(
        dense,
        plan,
        job.batches,
        importance=config.prune.importance,
        reconstruct=config.prune.reconstruct,
        removal=config.removal,
    )
    say(facts)
    return tune(job.ready(network), config.finetune, job, Files.of(cell.directory, "plan")), facts


def _slim(
    name: str, method: Method, budget: Budget, job: Job[SlimConfig], cell: Cell, starts: Starts
) -> tuple[nn.Module, dict[str, Any]]:
    """A method's network, trained to its end, and the facts for its artifact and record."""
    files = Files.of(cell.directory, name, cell.shared)
    if method.scratch:
        return _from_nothing(budget, job, files)
    if method.depth:
        return _shorter(budget, job, files)
    begin = _by_search if name == "auto" else _by_verdicts if method.candidates else _by_table
    first = begin(method, budget, job, cell, files, starts)
    network, found = slim_network(first.network, first.method, budget, job, first.files, first.widths)
    widths, begun = found.pop("widths"), first.begun
    facts = {"method": name, **first.facts}
    facts |= {field: begun[field] for field in ("removal", "collapsed") if field in begun} | found
    if not found.get("removal", {}).get("removed"):  # no plan says what was removed after the cut
        plan = SlimPlan(begun.get("blocks", {}), widths, begun.get("fuse", "cheaper"), layers_digest(job.original))
        facts["plan"] = plan.to_dict()
    return network, facts


class _Beginning(NamedTuple):
    """The network that is cut, and by which method. `begun`: the facts of how it was made; `widths`: of a plan, by layers, from which it
    is cut; `files`: by the name of what was chosen; `facts`: of that choice."""

    method: Method
    network: nn.Module
    begun: Mapping[str, Any]
    widths: Mapping[str, int] | None
    files: Files
    facts: dict[str, Any]


def _by_search(
    method: Method, budget: Budget, job: Job[SlimConfig], cell: Cell, files: Files, starts: Starts
) -> _Beginning:
    found = auto.choose_plan(with_names(job.original, job), starts, budget, job, files)
    made = _from_start(found.method, cell, starts) if found.begun is None else (found.network, found.begun)
    why = {name: {key: plan[key] for key in ("why", "predicted", "blocks")} for name, plan in found.plans.items()}
    facts = {
        "chosen": found.name,
        "candidates": {name: {**verdict, **why.get(name, {})} for name, verdict in found.verdicts.items()},
        "search": {"seconds": found.seconds},
    }
    return _Beginning(found.method, *made, found.widths, files.named(f"{files.label}-{found.name}"), facts)


def _by_verdicts(
    method: Method, budget: Budget, job: Job[SlimConfig], cell: Cell, files: Files, starts: Starts
) -> _Beginning:
    cutters = {one: functools.partial(_cutter, METHODS[one], budget, job, starts) for one in method.candidates}
    verdicts = judge(cutters, budget, job, files)
    chosen = best(verdicts)
    network, begun = _from_start(METHODS[chosen], cell, starts)
    facts = {"chosen": chosen, "candidates": verdicts}
    return _Beginning(METHODS[chosen], network, begun, None, files.named(f"{files.label}-{chosen}"), facts)


def _by_table(
    method: Method, budget: Budget, job: Job[SlimConfig], cell: Cell, files: Files, starts: Starts
) -> _Beginning:
    network, begun = _from_start(method, cell, starts)
    return _Beginning(method, network, begun, None, files, {})


def _from_start(method: Method, cell: Cell, starts: Starts) -> tuple[nn.Module, Mapping[str, Any]]:
    """The network that the method starts from, and the facts of how it was made."""
    network = starts(method.start)
    return network, {} if method.start == "dense" else artifact.read_extra(cell.shared / method.start)


def _shorter(budget: Budget, job: Job[SlimConfig], files: Files) -> tuple[nn.Module, dict[str, Any]]:
    network, facts = depth.shorten(with_names(job.original, job), budget, job, files)
    return tune(job.ready(network), job.config.finetune, job, files), facts


def _from_nothing(budget: Budget, job: Job[SlimConfig], files: Files) -> tuple[nn.Module, dict[str, Any]]:
    find = functools.partial(scratch.narrowed, budget=budget, job=job)
    network, facts = narrower(job, files, files.note("width"), "width", find)
    return network, {"method": files.label, "search": {"method": "width"} | facts}


def _cutter(method: Method, budget: Budget, job: Job[SlimConfig], starts: Starts) -> Cutter:
    return make_cutter(starts(method.start), method, job, budget)
