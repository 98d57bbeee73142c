"""Tasks worked off on workers, so many at once: submitit's, which are processes of this machine or jobs of Slurm. It knows no cells."""

import contextlib
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rmprune.config import GridConfig
from rmprune.errors import ArtifactError, ConfigError, RmpruneError, first_line
from rmprune.runs.directory import Finished

logger = logging.getLogger("rmprune")
TRIES = 3  # workers that a task may lose, the last one included
LOOK = 0.5  # seconds between two looks at the workers


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
        return first_line(error), True


def workers_of(config: GridConfig) -> Submit:
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
