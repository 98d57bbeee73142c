"""`grid`: a comparison of `slim`, each cell (a seed, a budget, a method) a run of its own on a worker of its own.

DIR/seed0/ holds what the cells of a seed share (`dense/`, `plain/`, ...), made by one worker before they begin;
DIR/seed0/macs_ratio-0.5-rm/ is a cell, a run of `slim` with its record. What is done is not done again, and a cell that was cut short
goes on from its checkpoint, so a worker that is lost costs the time since then. Times are measured at the end, of all cells of a seed
in turns, by one worker with nobody beside it.

Workers are submitit's: processes of this machine, or jobs of Slurm. The order of the stages of a cell is slim's.
"""

import contextlib
import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock

from rmprune.artifact.files import ARCHITECTURE
from rmprune.config import GridConfig, RemeasureConfig, SlimConfig
from rmprune.errors import ArtifactError, ConfigError, RmpruneError, first_line
from rmprune.methods.table import find_methods
from rmprune.pipelines.measure import run_measure
from rmprune.pipelines.slim import refuse_early, run_cell, starts_of
from rmprune.pipelines.stages import dense_network, open_data, pick_device
from rmprune.runs.cells import Cell
from rmprune.runs.directory import LOCK_FILE, Finished, alone, claim
from rmprune.runs.notes import read_notes, write_text
from rmprune.training.distributed import processes
from rmprune.training.job import Job
from rmprune.training.precision import repeatable

logger = logging.getLogger("rmprune")
TRIES = 3  # workers that a cell may lose, the last one included
MEASURED = "measured.json"
LOOK = 0.5  # seconds between two looks at the workers
# What cells measure for their records until all are measured.
NO_TIME: dict[str, Any] = {"seconds": 0.0, "min_rounds": 1}


class Worker(Protocol):
    """What is asked of submitit's jobs."""

    def done(self) -> bool: ...

    def result(self) -> Any: ...

    def cancel(self) -> Any: ...


Submit = Callable[..., Worker]
"""submit(function, *arguments): run it on a worker."""


@dataclass(frozen=True)
class Task:
    """One worker's work: a cell, or what the cells of a seed share. `files`: all there once it is done; `after`: to be done before."""

    name: str
    work: Callable[..., object]
    arguments: tuple[Any, ...]
    files: tuple[Path, ...]
    after: "Task | None" = None

    @property
    def done(self) -> bool:
        """Whether it is."""
        return all(file.is_file() for file in self.files)


def run_grid(config: GridConfig, *, command: str, submit: Submit | None = None) -> list[Path]:
    """Do every cell that is not done yet, measure all, and return the records. A cell that cannot be had is logged, and the others go on.

    Raises RmpruneError where no cell can be had, `Finished` where all are done and measured, ConfigError for what is no grid.
    """
    _refuse(config)
    if config.cluster == "local":  # else this machine may lack the GPU or the images; the first worker says it
        _open(replace(slim_config(config), out=config.directory))
    submit = submit or _workers(config)
    with alone(config.directory):
        return _work_off_all(config, command, submit)


def _work_off_all(config: GridConfig, command: str, submit: Submit) -> list[Path]:
    tasks = plan_tasks(config, command)
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
                    prune=replace(config.prune, **others | {kind: (value,)}),
                    out=cell.directory,
                )
                tasks.append(
                    Task(
                        f"seed {seed}, {kind} {value:g}, {method}", do_cell, (own, cell, command), (cell.record,), first
                    )
                )
    return tasks


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
    with (
        repeatable(config.deterministic, job.device),
        claim(config.directory, config, records=files, networks={"dense", *names}, overwrite=False, wait=True),
    ):
        starts = starts_of(replace(job, teacher=dense_network(job, cell)), cell)
        for name in sorted(names):
            starts(name)


def do_cell(config: SlimConfig, cell: Cell, command: str) -> None:
    """One seed, budget and method, to its record."""
    job = Job(config, open_data(config), pick_device(config.device), config.seed)
    with (
        repeatable(config.deterministic, job.device),
        claim(config.directory, config, records=[cell.record], networks=set(), overwrite=False, wait=True),
    ):
        measure = replace(config.measure, **NO_TIME)
        run_cell(cell, find_methods(config.method), None, job, command, measure)


def attempt(work: Callable[..., object], *arguments: Any) -> str:
    """On a worker: do it; returns why it cannot be done, "" where it was."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        work(*arguments)
    except Finished:
        pass
    except RmpruneError as error:
        return str(error)
    return ""


def work_off(tasks: list[Task], submit: Submit, workers: int) -> dict[str, str]:
    """Do all tasks that are not done, so many at once; returns why some could not be, by their names.

    A worker that ends without a word is lost: its task begins again, up to TRIES times. On Ctrl-C all workers are told to stop.
    """
    waiting = [task for task in tasks if not task.done]
    running: list[tuple[Task, Worker]] = []
    refused: dict[str, str] = {}
    lost: Counter[str] = Counter()
    total, started = len(waiting), time.monotonic()
    try:
        while waiting or running:
            for task, worker in [pair for pair in running if pair[1].done()]:
                running.remove((task, worker))
                why, gone = _said(worker)
                lost[task.name] += gone
                if gone and lost[task.name] < TRIES:
                    logger.warning("%s: its worker was lost (%s); it begins again where it was", task.name, why)
                    waiting.insert(0, task)
                elif why:
                    refused[task.name] = why
                    logger.warning("%s: %s", task.name, why)
                else:
                    done = total - len(waiting) - len(running)
                    logger.info("%s: done (%d of %d, %.0f s)", task.name, done, total, time.monotonic() - started)
            for task in [task for task in waiting if task.after and task.after.name in refused]:
                waiting.remove(task)
                refused[task.name] = f"{task.after.name} could not be had"  # type: ignore[union-attr]
            ready = [task for task in waiting if task.after is None or task.after.done]
            for task in ready[: workers - len(running)]:
                waiting.remove(task)
                running.append((task, submit(attempt, task.work, *task.arguments)))
            if running:
                time.sleep(LOOK)
    except BaseException:
        for _, worker in running:
            worker.cancel()
        raise
    return refused


def _said(worker: Worker) -> tuple[str, bool]:
    """(why its work could not be done, whether it was lost instead)."""
    try:
        return str(worker.result()), False
    except Exception as error:  # submitit's, for whatever ended it
        return str(error).strip().splitlines()[0], True


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


def _workers(config: GridConfig) -> Submit:
    """submitit's, for this machine or Slurm. Raises ConfigError where there are none."""
    try:
        import submitit
    except ImportError:
        raise ConfigError("grid needs submitit; install it with: pip install 'rmprune[grid]'") from None
    if config.cluster == "local":  # the cores are divided; what a worker is told, its own processes inherit
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // config.jobs)))
    asked = dict(pair.split("=", 1) for pair in config.slurm)
    try:
        executor = submitit.AutoExecutor(folder=config.directory / "jobs", cluster=config.cluster)
        executor.update_parameters(
            name=config.directory.name,
            timeout_min=max(1, round(60 * config.hours)),
            gpus_per_node=config.gpus,
            **{f"slurm_{name}": int(value) if value.isdigit() else value for name, value in asked.items()},
        )
    except OSError as error:
        raise ArtifactError(
            f"{config.directory}: cannot be written ({error.strerror or error}); choose another --out"
        ) from None
    except (RuntimeError, ValueError, NameError, TypeError) as error:
        raise ConfigError(f"{config.cluster}: {first_line(error)}") from None

    def submit(*work: Any) -> Worker:
        with _stderr_in(config.directory / "jobs" / "submitit.txt"), _interruptible():
            worker: Worker = executor.submit(*work)
        return worker

    return submit


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Processes that are started within heed SIGINT, by which they are stopped, also where this one was begun with `&` in a script."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _stderr_in(file: Path) -> Iterator[None]:
    """What processes that are started within say of themselves goes to this file: the traceback of each that is stopped."""
    usual = os.dup(2)
    try:
        with file.open("ab") as other:
            os.dup2(other.fileno(), 2)
        yield
    finally:
        os.dup2(usual, 2)
        os.close(usual)
