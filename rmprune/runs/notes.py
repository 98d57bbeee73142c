"""Small JSON and text files of a run, written whole or not at all, and what was found once remembered there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmprune.errors import ArtifactError
from rmprune.runs.reading import read_json
from rmprune.runs.writing import write_text


def remembered(file: Path, key: str, find: Callable[[], Any]) -> Any:
    """What was found (a JSON value) under `key` of a JSON file; found and written there where it is not there yet.

    For what is measured: measured again after an interruption it would differ, and with it the network that a checkpoint
    belongs to. Raises ArtifactError for a damaged file.
    """
    known = read_notes(file)
    if key not in known:
        known[key] = find()
        write_text(file, json.dumps(known))
    return known[key]


def read_notes(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a run, empty where there is no such file. Raises ArtifactError for a damaged one."""
    if not file.exists():
        return {}
    damaged = "choose another --out, or --overwrite the run"
    known = read_json(file, missing="gone meanwhile", damaged=damaged)
    if not isinstance(known, dict):
        raise ArtifactError(f"{file}: damaged (not a JSON object); {damaged}")
    return known
