"""Run directories: who may write where, what is finished, what goes on where it was. No stage logic."""

import contextlib
import logging
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from rmprune.config.toml import differences, from_toml, to_toml
from rmprune.errors import ArtifactError, ConfigError
from rmprune.runs.named import keep_digests, named_files, plan_text, refuse_changed
from rmprune.runs.reading import parse_json, read_json
from rmprune.runs.records import CONFIG_FILE
from rmprune.runs.writing import LEFT, LOCK_FILE, sweep, write_text

logger = logging.getLogger("rmprune")
Config = TypeVar("Config")
PLAN_FILE = "plan.json"
WRITTEN = re.compile(
    r"config\.toml|plan\.json|files\.json|log\.jsonl|record\.json|latency\.json|layer-times-.+\.json|checkpoint|search|report|deploy|tensorboard|seed-?\d+|\..+\.(tmp|old|partial)"
)


class Finished(ConfigError):
    """A run that is finished already, and nothing is left to do."""


@contextlib.contextmanager
def claim(
    directory: Path, config: Config, *, records: list[Path], networks: Collection[str], overwrite: bool,
    wait: bool = False, photos: str = "", free: Collection[str] = (),
) -> Iterator[None]:  # fmt: skip
    """Make `directory` this config's run: new, or the same run interrupted earlier. Writes config.toml, a copy of the
    plan, where there is one, digests of what else settings name and of the photos (`photos`), and while in use .lock, which keeps other
    processes out; `wait`: until one that is at it has ended; `free`: paths of settings that may be others than when the run began.

    With `overwrite` what a run of the same command wrote there is taken away first, and nothing else; `networks` are the
    names of the artifacts that it may have written.
    Raises ConfigError where the directory holds a finished run, a run with other settings, one that another process is at, or
    something that is no run, and ArtifactError where it cannot be written.
    """
    lock = FileLock(directory / LOCK_FILE, timeout=-1 if wait else 0)
    try:
        with _said(directory):
            _prepare(directory, config, records, networks if overwrite else None, lock, photos, free)
        yield
    finally:
        lock.release()


def refuse_used(directory: Path, config: Config, records: list[Path], *, overwrite: bool) -> None:
    """Raise what `claim` would, but for other processes: asked before anything that takes long, and nothing is written."""
    with _said(directory):
        if _holds_run(directory):
            _refuse_overwriting(directory, config) if overwrite else _refuse_other(directory, config, records)


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep other processes out of a directory of runs. Raises as `claim`."""
    lock = FileLock(directory / LOCK_FILE, timeout=0)
    with _said(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(
    directory: Path, config: Config, records: list[Path], overwritten: Collection[str] | None, lock: BaseFileLock,
    photos: str, free: Collection[str],
) -> None:  # fmt: skip
    _holds_run(directory)  # or nothing is made there
    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if lock.timeout == 0:
            raise
        logger.info("%s: waiting for the process that is at it", directory)
        lock.acquire()
    sweep(directory)
    begun = _holds_run(directory)  # perhaps while this one waited
    if begun:
        if overwritten is not None:
            _refuse_overwriting(directory, config)
        else:
            _refuse_other(directory, config, records, photos, free)
    plan = plan_text(config)
    if begun and overwritten is not None:
        _clear(directory, overwritten)
    write_text(directory / CONFIG_FILE, to_toml(config))  # first: it says that this is a run
    if plan is not None and not (directory / PLAN_FILE).exists():
        write_text(directory / PLAN_FILE, plan)
    keep_digests(directory, config, photos)


def _holds_run(directory: Path) -> bool:
    """Whether a run has begun there. Raises ConfigError where something else lies there."""
    names = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    if (directory / CONFIG_FILE).is_file():
        return True
    if any(name != LOCK_FILE and not LEFT.fullmatch(name) for name in names):
        raise ConfigError(f"{directory}: not empty, and not a run of rmprune; choose another --out")
    return False


@contextlib.contextmanager
def _said(directory: Path) -> Iterator[None]:
    """One clear error for what keeps a directory from being had."""
    try:
        yield
    except Timeout:
        raise ConfigError(
            f"{directory}: another process is at this run; wait for it, or choose another --out"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"{directory}: cannot be written ({reason}); choose another --out") from None


def _refuse_overwriting(directory: Path, config: Config) -> None:
    """Raise ConfigError where a run is another command's, or holds what the new one starts from."""
    try:
        from_toml(type(config), directory / CONFIG_FILE)
    except ConfigError as error:
        raise ConfigError(f"not overwritten, not a run of this command: {error}; choose another --out") from None
    for given in named_files(config).values():
        if given.resolve().is_relative_to(directory.resolve()):
            raise ConfigError(f"{given}: lies in the run that --overwrite would replace; choose another --out")


def _clear(directory: Path, networks: Collection[str]) -> None:
    """Take away what a run wrote, config.toml last; anything else in the directory stays."""
    known = directory / CONFIG_FILE
    ours = [entry for entry in directory.iterdir() if WRITTEN.fullmatch(entry.name) or entry.name in networks]
    for entry in sorted(ours, key=lambda entry: entry == known):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _refuse_other(
    directory: Path, config: Config, records: list[Path], photos: str = "", free: Collection[str] = ()
) -> None:
    changed = differences(from_toml(type(config), directory / CONFIG_FILE), config, free=free)
    if changed:
        raise ConfigError(
            f"{directory}: holds a run with other settings ({'; '.join(changed)}); give its own to go on, choose another --out, or "
            "--overwrite"
        )
    plan, begun = plan_text(config), directory / PLAN_FILE
    kept = read_json(begun, missing="gone", damaged="take it away to go on") if plan and begun.is_file() else None
    if plan and kept and parse_json(plan) != kept:
        raise ConfigError(
            f"{directory}: holds a run with another plan ({named_files(config)['plan']} has changed since it began); to go on copy {begun} "
            "over it, or choose another --out, or --overwrite"
        )
    refuse_changed(directory, config, photos=photos)
    if all(record.is_file() for record in records):
        raise Finished(
            f"{directory}: this run is finished; see it with `python -m rmprune report {directory}`, or --overwrite"
        )


def tidy(directory: Path) -> None:
    """Take away what killed writers left in a run, unless another process is at it."""
    lock = FileLock(directory / LOCK_FILE)
    with contextlib.suppress(Timeout, OSError), lock.acquire(blocking=False):
        sweep(directory)


def runs_of(records: list[Path]) -> list[Path]:
    """The run directories that records belong to: the record's own, or one of the two above it, where the run has several cells."""
    folders = (folder for record in records for folder in record.parents[:3])
    return list(dict.fromkeys(folder for folder in folders if (folder / CONFIG_FILE).is_file()))
