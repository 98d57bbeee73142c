"""`grid`: a comparison of `slim`, each cell (a seed, a budget, a method) a run of its own on a worker of its own.

DIR/seed0/ holds what the cells of a seed share (`dense/`, `plain/`, ...), made by one worker before they begin;
DIR/seed0/macs_ratio-0.5-rm/ is a cell, a run of `slim` with its record. What is done is not done again, and a cell that was cut short
goes on from its checkpoint, so a worker that is lost costs the time since then. Times are measured at the end, of all cells of a seed
in turns, by one worker with nobody beside it.

Workers are submitit's (`workers.py`). The order of the stages of a cell is slim's.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from rmprune.artifact.files import ARCHITECTURE
from rmprune.config import GridConfig, RemeasureConfig, SlimConfig
from rmprune.config.toml import differences, from_toml
from rmprune.errors import ConfigError, RmpruneError
from rmprune.methods.table import find_methods
from rmprune.pipelines.measure import run_measure
from rmprune.pipelines.slim import refuse_early, run_cell, starts_of
from rmprune.pipelines.stages import at_work, dense_network, open_data, pick_device
from rmprune.pipelines.unread import warn_unread
from rmprune.pipelines.workers import Submit, Task, work_off, workers_of
from rmprune.runs.cells import Cell
from rmprune.runs.directory import Finished, alone
from rmprune.runs.named import refuse_changed
from rmprune.runs.notes import read_notes
from rmprune.runs.records import CONFIG_FILE
from rmprune.runs.writing import LOCK_FILE, write_text
from rmprune.training.distributed import processes
from rmprune.training.job import Job

logger = logging.getLogger("rmprune")
MEASURED = "measured.json"
# Settings that a later call may have others of: what cells share does not depend on them.
OF_CELLS = ("method", "choices", "prune.ratio", "prune.macs_ratio", "prune.latency_ratio", "prune.memory_ratio")
# What cells measure for their records until all are measured.
NO_TIME: dict[str, Any] = {"seconds": 0.0, "min_rounds": 1}


def run_grid(config: GridConfig, *, command: str, submit: Submit | None = None) -> list[Path]:
    """Do every cell that is not done yet, measure all, and return the records. A cell that cannot be had is logged, and the others go on.

    Raises RmpruneError where no cell can be had, `Finished` where all are done and measured, ConfigError for what is no grid.
    """
    _refuse(config)
    warn_unread(slim_config(config))
    if config.cluster == "local":  # else this machine may lack the GPU or the images; the first worker says it
        _open(replace(slim_config(config), out=config.directory))
    submit = submit or workers_of(config)
    with alone(config.directory):
        return _work_off_all(config, command, submit)


def _work_off_all(config: GridConfig, command: str, submit: Submit) -> list[Path]:
    tasks = plan_tasks(config, command)
    _refuse_mixed(tasks)
    refused = work_off(tasks, submit, config.jobs)
    cells = [task for task in tasks if task.after is not None]
    found = [task.files[0] for task in cells if task.done]
    if not found:
        raise RmpruneError(f"no cell can be had: {'; '.join(dict.fromkeys(refused.values()))}")
    measuring = list(plan_measuring(config, found))
    if not measuring:
        raise Finished(
            f"{config.directory}: this grid is finished; see it with `python -m rmprune report {config.directory}`"
        )
    refused |= work_off(measuring, submit, 1)
    if refused:
        logger.warning("not had: %s", "; ".join(f"{name}: {why}" for name, why in refused.items()))
    return found


def slim_config(config: GridConfig) -> SlimConfig:
    """The same comparison as one run of `slim`."""
    return SlimConfig(**{field.name: getattr(config, field.name) for field in fields(SlimConfig) if field.init})


def plan_tasks(config: GridConfig, command: str) -> list[Task]:
    """What is to be done, seed by seed: what its cells share, then these. Each cell's settings are a `slim` of one method and budget."""
    tasks = []
    for seed in range(config.seed, config.seed + config.seeds):
        shared = config.directory / f"seed{seed}"
        whole = replace(slim_config(config), seed=seed, seeds=1, out=shared)
        names = {"dense", *(method.start for method in find_methods(config.method).values())}
        first = Task(f"seed {seed}", share, (whole,), tuple(shared / name / ARCHITECTURE for name in sorted(names)))
        tasks.append(first)
        others: dict[str, Any] = {kind: () for kind, _ in config.prune.budgets}
        for kind, value in config.prune.budgets:
            for method in config.method:
                cell = Cell(
                    seed, kind, value, shared / f"{kind}-{value:g}-{method}", shared, config.prune.memory_beside
                )
                own = replace(
                    whole,
                    method=(method,),
                    choices=whole.choices if method == "auto" else (),
                    search_minutes=whole.search_minutes if method == "auto" else None,
                    prune=replace(config.prune, **others | {kind: (value,)}),
                    out=cell.directory,
                )
                tasks.append(
                    Task(
                        f"seed {seed}, {kind} {value:g}, {method}", do_cell, (own, cell, command), (cell.record,), first
                    )
                )
    return tasks


def _refuse_mixed(tasks: list[Task]) -> None:
    """Raise ConfigError where a cell, or what cells share, was begun with other settings than it has now: nothing could be compared."""
    for task in tasks:
        now, shared = task.arguments[0], task.after is None
        if (begun := now.directory / CONFIG_FILE).is_file():
            changed = differences(from_toml(SlimConfig, begun), now, free=OF_CELLS if shared else ())
            if changed:
                raise ConfigError(
                    f"{now.directory}: {'what its cells share' if shared else 'this cell'} was made with other settings "
                    f"({'; '.join(changed)}); give these to go on, or choose another --out"
                )


def _open(config: SlimConfig) -> Job[SlimConfig]:
    """The images and the device of a run, once all that can be refused early was."""
    job = Job(config, open_data(config), pick_device(config.device), config.seed)
    refuse_early(find_methods(config.method), None, job)
    return job


def share(config: SlimConfig) -> None:
    """What the cells of a seed share: the trained network, and those that methods start from."""
    job = _open(config)
    cell = Cell(config.seed, "", 0.0, config.directory, config.directory)
    names = {method.start for method in find_methods(config.method).values()}
    files = [config.directory / name / ARCHITECTURE for name in {"dense", *names}]
    with at_work(job, files, {"dense", *names}, wait=True, free=OF_CELLS):
        starts = starts_of(replace(job, teacher=dense_network(job, cell)), cell)
        for name in sorted(names):
            starts(name)


def do_cell(config: SlimConfig, cell: Cell, command: str) -> None:
    """One seed, budget and method, to its record."""
    job = Job(config, open_data(config), pick_device(config.device), config.seed)
    refuse_changed(cell.shared, config, photos=job.data.photos)
    with at_work(job, [cell.record], (), wait=True):
        measure = replace(config.measure, **NO_TIME)
        run_cell(cell, find_methods(config.method), None, job, command, measure)


def plan_measuring(config: GridConfig, found: list[Path]) -> Iterator[Task]:
    """For each seed that was not measured since its last cell was done: all its cells in turns, by one worker."""
    for shared in dict.fromkeys(record.parent.parent for record in found):
        note, own = shared / MEASURED, [record for record in found if record.is_relative_to(shared)]
        names = [record.parent.name for record in own]
        if read_notes(note).get("cells") != names:
            note.unlink(missing_ok=True)
            asked = RemeasureConfig(tuple(own), measure=config.measure)
            yield Task(f"measuring {shared.name}", measure_all, (asked, note, names), (note,))


def measure_all(config: RemeasureConfig, note: Path, names: list[str]) -> None:
    """Measure the networks of these records, and write down that it was done."""
    with FileLock(note.with_name(LOCK_FILE)):  # not beside a worker whose grid was killed
        if read_notes(note).get("cells") != names:
            run_measure(config)
            write_text(note, json.dumps({"cells": names}))


def _refuse(config: GridConfig) -> None:
    if processes() > 1:
        raise ConfigError("under torchrun: start grid by itself, its workers are its processes")
    if config.plan is not None:
        raise ConfigError("a plan is one network, and no grid; carry it out by slim")
    if config.overwrite:
        raise ConfigError(
            "a grid is never overwritten; choose another --out, or take away the cells that are to be done again"
        )
    timed = [name for name, method in find_methods(config.method).items() if method.faster]
    if config.cluster == "local" and config.jobs > 1 and (config.prune.latency_ratio or timed):
        raise ConfigError(
            f"{', '.join(timed) or 'latency_ratio'}: decided by measured times, which other workers on this machine would disturb; give "
            "--jobs 1, or --macs-ratio and methods that measure nothing"
        )
