"""Small JSON and text files of a run, written whole or not at all, and what was found once remembered there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmprune.errors import ArtifactError


def remembered(file: Path, key: str, find: Callable[[], Any]) -> Any:
    """What was found (a JSON value) under `key` of a JSON file; found and written there where it is not there yet.

    For what is measured: measured again after an interruption it would differ, and with it the network that a checkpoint
    belongs to. Raises ArtifactError for a damaged file.
    """
    known = read_notes(file)
    if key not in known:
        known[key] = find()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(known))
    return known[key]


def read_notes(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a run, empty where there is no such file. Raises ArtifactError for a damaged one."""
    try:
        known = json.loads(file.read_text()) if file.is_file() else {}
        if not isinstance(known, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise ArtifactError(f"{file}: damaged ({error}); choose another --out, or --overwrite the run") from None
    return known


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
