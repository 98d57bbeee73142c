"""The records under the paths that a report is asked for: those that can be reported together, and why the others cannot."""

from pathlib import Path
from typing import Any

from rmprune.errors import ArtifactError
from rmprune.report.comparable import incomparable
from rmprune.runs.records import CONFIG_FILE, RECORD, find_records, read_record

Records = dict[Path, dict[str, Any]]


def gather(paths: list[Path]) -> tuple[Records, list[str]]:
    """Records by their files, and a sentence for everything that is left out: paths without a record, unfinished runs,
    records that are damaged, newer, or not to be averaged with the ones before.

    Raises ArtifactError with these sentences where no record is left.
    """
    found: dict[Path, dict[str, Any]] = {}  # by resolved path, so that a record named twice counts once
    names: dict[Path, Path] = {}
    left_out: list[str] = []
    for path in paths:
        try:
            files = find_records([path])
        except ArtifactError as error:
            left_out.append(str(error))
            continue
        left_out += [f"{run}: there is no {RECORD}; is the run finished?" for run in _unfinished(path, files)]
        for file in files:
            if file.resolve() in names:
                continue
            names[file.resolve()] = file
            try:
                record = read_record(file)
            except ArtifactError as error:
                left_out.append(str(error))
                continue
            if record["original"]["accuracy"] is None:
                left_out.append(f"{file}: its networks have a loss of their own, and no accuracy to draw")
            else:
                found[file.resolve()] = record
    records = {names[file]: record for file, record in found.items()}
    unlike = incomparable(records)
    left_out = list(dict.fromkeys(left_out + list(unlike.values())))
    if not records:
        raise ArtifactError("; ".join(left_out))
    return {file: record for file, record in records.items() if file not in unlike}, left_out


def _unfinished(path: Path, records: list[Path]) -> list[Path]:
    """Run directories under `path` without a record of their own or in a cell below them."""
    runs = sorted(file.parent for file in path.rglob(CONFIG_FILE)) if path.is_dir() else []
    return [run for run in runs if not any(record.is_relative_to(run) for record in records)]
