"""Run directories: who may write where, what is finished, what goes on where it was. No stage logic."""

import os
import shutil
from pathlib import Path
from typing import TypeVar

from rmprune.configfile import differences, from_toml, to_toml
from rmprune.errors import ArtifactError, ConfigError

Config = TypeVar("Config")
CONFIG_FILE = "config.toml"
RECORD_FILE = "record.json"


def claim(directory: Path, config: Config, *, records: list[Path], overwrite: bool) -> None:
    """Make `directory` this config's run: new, or the same run interrupted earlier. Writes config.toml and nothing else.

    Raises ConfigError where the directory holds a finished run, a run with other settings or something that is no run,
    and ArtifactError where it cannot be written.
    """
    known = directory / CONFIG_FILE
    try:
        if directory.exists() and any(directory.iterdir()):
            if not known.is_file():
                raise ConfigError(f"{directory}: not empty, and not a run of rmprune; choose another --out")
            if overwrite:
                shutil.rmtree(directory)
            else:
                _refuse_other(directory, config, known, records)
        directory.mkdir(parents=True, exist_ok=True)
        write_text(known, to_toml(config))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"{directory}: cannot be written ({reason}); choose another --out") from None


def _refuse_other(directory: Path, config: Config, known: Path, records: list[Path]) -> None:
    changed = differences(from_toml(type(config), known), config)
    if changed:
        raise ConfigError(
            f"{directory}: holds a run with other settings ({'; '.join(changed)}); choose another --out, or --overwrite"
        )
    if all(record.is_file() for record in records):
        raise ConfigError(
            f"{directory}: this run is finished; see it with `python -m rmprune report {directory}`, or --overwrite"
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
