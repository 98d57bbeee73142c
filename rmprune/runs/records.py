"""What a run measured, as JSON: written whole or not at all, checked both ways. Reports read nothing else; weights
live in artifacts.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmprune.errors import ArtifactError
from rmprune.runs.reading import read_json
from rmprune.runs.writing import write_text

SCHEMA = 1
RECORD = "record.json"
CONFIG_FILE = "config.toml"  # every run directory has one from its first second on
STAGES = ("original", "plain", "pruned", "coupled")
"""The usual networks of a record, in the order of a report; any other entry with the same fields is a network too."""
RENAMED = {"coupled-collapse": "residual-collapse", "coupled-half-collapse": "residual-half-collapse"}
"""{name of a method in flags, settings, records and directories of before: its name now}. Neither of these uses Torch-Pruning."""
_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (int,), "command": (str,), "config": (dict,), "seed": (int,), "method": (str,), "environment": (dict,),
    "removal": (dict, type(None)), "original": (dict,),
}  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _may(form: Any) -> Callable[[Any], bool]:
    """As `form`, or not there."""
    return lambda value: value is None or _fits(value, form)


def _fits(value: Any, form: Any) -> bool:
    """Whether a value is of a form: a type, a test, [what a list holds], {field: form}, or {str: what an object of any fields holds}."""
    if isinstance(form, dict):
        of = dict.fromkeys(value, form[str]) if str in form and isinstance(value, dict) else form
        return isinstance(value, dict) and all(_fits(value.get(field), inner) for field, inner in of.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(inner, form[0]) for inner in value)
    return isinstance(value, form) and not isinstance(value, bool) if isinstance(form, type) else bool(form(value))


def _sizes(value: Any) -> bool:
    return bool(value) and _fits(value, [_is_count])


_REMOVAL = {"removed": [str], "kept": {str: str}, "max_error": _is_number}
_LAYER = {"name": str, "cout": _is_count}
_CONVOLUTION = _LAYER | {"size": _sizes, "groups": _is_count, "kernel": _sizes, "stride": _sizes}
_EPISODE = {"reward": _is_number, "source": str}
_WIDTH = {"group": str, "whole": _is_count, "kept": int}
_SEARCH = {
    "episodes": _may([_EPISODE]),
    "widths": _may([_WIDTH]),
    "verified_ratio": _may(_is_number),
    "seconds": _may(_is_number),
}
_KERNEL = {"layer": str, "operator": str, "ms": _is_number, "share": _is_share} | dict.fromkeys(
    ("cin", "cout", "macs"), _may(_is_count)
)
_SHOWN: dict[str, Any] = {
    "model": _may(str),
    "dataset": _may(str),
    "config": {"measure": _may({name: _may([lambda _: True]) for name in ("backends", "threads", "batch_sizes")})},
    "budget": _may({str: _is_number}),
    "refused": {str: str},
    "training": _may({str: [{"validation_accuracy": _may(_is_share)}]}),
}
"""What a record may say besides; of records and (below) of networks, since reports and cards draw it."""
_DRAWN: dict[str, Any] = {
    "method": _may(str),
    "balanced_accuracy": _may(_is_share),
    "auc": _may(_is_share),
    "activation_bytes": _may(_is_count),
    "validation": _may({str: _may(_is_number)}),
    "classes": _may([{"name": str, "images": int, "recall": _may(_is_share), "precision": _may(_is_share)}]),
    "layers": _may([lambda layer: _fits(layer, _LAYER) and ("kernel" not in layer or _fits(layer, _CONVOLUTION))]),
    "residuals": _may([{"from": int, "to": int, "shortcut": list}]),
    "removal": _may(_REMOVAL),
    "collapsed": _may({str: _is_number}),
    "plan": _may(dict),
    "chosen": _may(str),
    "candidates": _may(dict),
    "search": _may(_SEARCH),
    "profile": _may({"backend": str, "threads": _is_count, "batch_size": _is_count, "layers": [_KERNEL]}),
}


def networks(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The networks of a record, original first: every entry with `accuracy`, `macs`, `params` and `latency`."""
    found = {
        k: v for k, v in record.items() if isinstance(v, dict) and {"accuracy", "macs", "params", "latency"} <= v.keys()
    }
    order = {name: position for position, name in enumerate(STAGES)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def check_record(record: Any) -> None:
    """Raises ArtifactError that names the first field of `record` that is missing or wrong.

    A record has `schema`, `command`, `config`, `seed`, `method`, `environment` (`versions`, `processor`, `threads`),
    `removal` (`removed`, `kept`, `max_error`; None where no residual was to be removed), and `original` with at least
    one more network; it may have `refused`, {method: why its budget could not be met}, and `unread`, {path of a setting in `config`:
    why nothing read it}. A network has `accuracy` (0 to
    1; None where it has a `loss` instead), `macs` and `params` (of one image), may have `balanced_accuracy`, `auc`, `classes`
    (name, images, recall, precision) and `validation` (accuracy and loss on the images that choices see),
    and has `latency`, a list of {backend, device, threads, batch_size, median_ms, q1_ms, q3_ms}.
    """
    if not isinstance(record, dict):
        raise ArtifactError("a record is a JSON object")
    for field, kinds in _FIELDS.items():
        if not isinstance(record.get(field, ...), kinds) or isinstance(record.get(field), bool):
            raise ArtifactError(f"{field!r} is missing or not of type {' or '.join(k.__name__ for k in kinds)}")
    if record["schema"] != SCHEMA:
        raise ArtifactError(f"schema {record['schema']}, this version reads {SCHEMA}; update rmprune or run again")
    for field in ("versions", "processor", "threads"):
        if field not in record["environment"]:
            raise ArtifactError(f"'environment' has no {field!r}")
    if not isinstance(record["environment"]["versions"], dict):
        raise ArtifactError("'versions' of 'environment' is not an object")
    if record["removal"] and not _fits(record["removal"], _REMOVAL):
        raise ArtifactError("'removal' has no valid 'removed', 'kept' and 'max_error'")
    _check_more("", record, _SHOWN)
    for name in ("plain", "pruned", "coupled"):
        if name in record and name not in networks(record):
            raise ArtifactError(f"{name!r} lacks one of accuracy, macs, params, latency")
    if len(networks(record)) < 2 or "original" not in networks(record):
        raise ArtifactError("there is no complete 'original' network with at least one more to compare")
    for name, entry in networks(record).items():
        _check_network(name, entry)
        if (entry["accuracy"] is None) != (record["original"]["accuracy"] is None):
            raise ArtifactError(f"{name}: accuracy is there, or a loss in its place, where 'original' has the other")


def _check_network(name: str, entry: dict[str, Any]) -> None:
    if not _is_share(entry["accuracy"]) and not (entry["accuracy"] is None and _is_number(entry.get("loss"))):
        raise ArtifactError(f"{name}: accuracy is {entry['accuracy']!r}, not a number from 0 to 1")
    for field in ("macs", "params"):
        if not _is_count(entry[field]):
            raise ArtifactError(f"{name}: {field} is {entry[field]!r}, not a positive whole number")
    _check_more(f"{name}: ", entry, _DRAWN)
    layers = len(entry.get("layers") or ())
    if layers and not all(-1 <= end[at] < layers for end in entry.get("residuals") or () for at in ("from", "to")):
        raise ArtifactError(f"{name}: 'residuals' lead beyond its {layers} layers")
    if not isinstance(entry["latency"], list):
        raise ArtifactError(f"{name}: latency is not a list")
    for position, latency in enumerate(entry["latency"]):
        where = f"{name}: latency {position}"
        if not isinstance(latency, dict):
            raise ArtifactError(f"{where} is not an object")
        for field in ("backend", "device"):
            if not isinstance(latency.get(field), str):
                raise ArtifactError(f"{where} has no {field!r}")
        for field in ("threads", "batch_size"):
            if not _is_count(latency.get(field)):
                raise ArtifactError(f"{where}: {field} is {latency.get(field)!r}, not a positive whole number")
        for field in ("median_ms", "q1_ms", "q3_ms", *({"ratio"} & latency.keys())):
            if not _is_number(latency.get(field)) or latency[field] <= 0:
                raise ArtifactError(f"{where}: {field} is {latency.get(field)!r}, not a positive number")
        _check_more(f"{where}: ", latency, {"accuracy": _is_share, "number_format": str})


def _check_more(where: str, found: dict[str, Any], forms: dict[str, Any]) -> None:
    """Raise ArtifactError for the first of these fields that is there in another form than runs write."""
    for field, form in forms.items():
        if field in found and not _fits(found[field], form):
            raise ArtifactError(f"{where}{field!r} is not of the form that runs write: {str(found[field])[:80]}")


def write_record(path: str | os.PathLike[str], record: dict[str, Any]) -> Path:
    """Checks `record` (see `check_record`) and writes it as JSON, whole or not at all; returns the path. Raises ArtifactError for a record
    that is none."""
    path = Path(path)
    try:
        record = json.loads(json.dumps(record, default=_plain, allow_nan=False))
        check_record(record)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: the record cannot be written as JSON ({error})") from error
    except ArtifactError as error:
        raise ArtifactError(f"{path}: not written, {str(error)[:500]}") from error
    return write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """JSON for what configs and measurements hold besides plain values: paths, numpy and torch numbers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a value of type {type(value).__name__}")


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record in the file `path`, or in the run directory `path`; ArtifactError where it is missing, damaged or foreign."""
    path = Path(path)
    file = path / RECORD if path.is_dir() else path
    record = read_json(
        file, missing="there is no such record; is the run finished?", damaged="run again, or leave it out"
    )
    try:
        check_record(record)
    except ArtifactError as error:
        raise ArtifactError(f"{file}: not a valid record: {str(error)[:500]}") from error
    return dict(record)


def find_records(paths: list[Path]) -> list[Path]:
    """Record files under `paths`: files as given, directories searched; ArtifactError where a path holds none."""
    found: list[Path] = []
    for path in paths:
        records = [path] if path.is_file() else sorted(path.rglob(RECORD))
        if not records:
            raise ArtifactError(f"{path}: there is no record under it; give run directories that hold a {RECORD}")
        found += records
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def training_log(*directories: Path) -> dict[str, list[dict[str, Any]]]:
    """What log.jsonl of these directories says of each training, epoch by epoch, under its label: for a record.

    Of an epoch that was trained twice, after an interruption, the last stays; a line that is damaged is left out.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for log in dict.fromkeys(directory / "log.jsonl" for directory in directories):
        for line in log.read_bytes().splitlines() if log.is_file() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                epoch = json.loads(line)
                found.setdefault(epoch.pop("label"), {})[epoch["epoch"]] = epoch
    return {label: list(epochs.values()) for label, epochs in found.items()}
