"""Rows of one method and budget are averaged over seeds; records that differ in more than their seed are found here."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from rmprune.config import AmcConfig, GridConfig, PruneConfig, TrainConfig, TrainRunConfig
from rmprune.report.tables import budget_of, dataset_name, method_of, model_of
from rmprune.runs.records import CONFIG_FILE, networks


def _names(**tables: Any) -> frozenset[str]:
    """Of the settings in these tables: names of configs and their classes."""
    return frozenset(f"{table}.{field.name}" for table, kind in tables.items() for field in fields(kind))


def _changeable(*kinds: Any) -> frozenset[str]:
    """Names of the settings of these classes, and of the tables in them, that may be others when an interrupted run goes on."""
    found = {field.name for kind in kinds for field in fields(kind) if "changeable" in field.metadata}
    tables = {hint for kind in kinds for hint in get_type_hints(kind).values() if is_dataclass(hint)}
    return frozenset(found | (_changeable(*tables) if tables else set()))


_SEARCHED = frozenset({"search_minutes"})
"""Settings that may change in a run, and with them what is found: they tell the records of several runs apart."""
_OWN = _changeable(GridConfig, AmcConfig, TrainRunConfig) - _SEARCHED | {
    "seed", "seeds", "method", "model", "measure", "ratio", "macs_ratio", "latency_ratio", "memory_ratio", "budget", "device",
}  # fmt: skip
"""Settings that rows are told apart by, or that do not change a network."""
_BY_SEED = frozenset({"checkpoint", "data.labels", "data.split_seed"})
"""Settings that may differ where seeds do: each seed starts from a training of its own, on a split of its own."""
_UNREAD = frozenset(f"prune.{name}" for name in ("gradual", "cuts", "cut_fraction", "score_decay", "cost", "rank"))
_TORCH_PRUNING = ("coupled", "coupled-taylor", "coupled-isomorphic", "coupled-norm")
"""Methods that read none of these settings: Torch-Pruning has its own way of cutting."""
_RESIDUALS_STAY = (*_TORCH_PRUNING, "residual", "inner", "uniform", "scratch")
"""Methods that read no settings of a removal."""
_RANGES_UNREAD = (
    "depth",
    "mixed",
    "mixed-amc",
    "residual-amc",
    "residual-random",
    "residual-collapse",
    "residual-half-collapse",
)
"""Of the others those that read no ranges: none of their blocks is removed, or with bounds that hold for every input."""
_NOT_PRUNED = {
    "depth": _names(prune=PruneConfig),
    "scratch": _names(prune=PruneConfig, finetune=TrainConfig) - {"finetune.epochs"},
}
"""Settings that are not read where no channel is cut; what is trained from nothing reads of fine-tuning how long it takes."""
_FIXED = {
    "rm-slimming": ("gradual", "reconstruct", "importance", "rank"),
    "uniform": ("gradual",),
    **dict.fromkeys(_TORCH_PRUNING, ("gradual", "importance")),
}
"""Settings of `prune` that methods set themselves."""
_BY_TIME = ("mixed", "mixed-amc")
"""Methods that measure what they do, whatever the budget counts."""
_REMOVAL = {"removal.keep": [], "removal.ranges": "provable", "removal.form": "auto", "removal.fuse": "cheaper"}
"""Settings of a removal, which earlier records do not name, as they then were."""
_BEFORE = frozenset({"data", "train", "sparsity", "checkpoint"})
"""Settings that the network before pruning depends on."""


def incomparable(records: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """Records whose networks would be averaged with an earlier record's of the same model, data, method and budget, but had
    other settings; and why. The earlier record stays.
    """
    first: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
    found: dict[Path, str] = {}
    seeds = {path: record.get("seed") for path, record in records.items()}
    for path, record in records.items():
        settings = _settings(record)
        for key, mine in settings.items():
            other, theirs = first.get(key, (path, mine))
            unread = _unread(key[2])
            unread |= _BY_SEED if seeds[other] != seeds[path] else frozenset()
            unread |= _SEARCHED if _of_one_run(other, path) else frozenset()
            for setting in sorted((theirs.keys() | mine.keys()) - unread):
                before, now = theirs.get(setting), mine.get(setting)
                if before != now and path not in found and not _means_the_same(setting, records[other], record):
                    found[path] = (
                        f"{other} and {path} would be averaged as seeds of {key[2]}, but differ in {setting} "
                        f"({before} and {now}); report them one by one"
                    )
        if path not in found:
            first = {key: (path, mine) for key, mine in settings.items()} | first
    return found


def _of_one_run(one: Path, other: Path) -> bool:
    """Whether two records are of cells of one run, which lie in it or a folder further down."""
    return any((folder / CONFIG_FILE).is_file() for folder in {*one.parents[:3]} & {*other.parents[:3]})


def _means_the_same(setting: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records of one data set, in which a setting differs, name one thing by it: a network that was trained in one run and
    given to the other, or data that lies elsewhere."""
    if setting == "checkpoint":
        return _one_network(one["original"], other["original"])
    if setting == "data.data_dir" and dataset_name(one) != "imagefolder":
        return True
    photos = one.get("photos")
    return setting in ("data.data_dir", "data.labels") and photos is not None and photos == other.get("photos")


def _one_network(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two entries of `original` are of one trained network: two that were trained apart differ in one of these."""
    mine, theirs = _sums(one), _sums(other)
    return all(one.get(name) == other.get(name) for name in ("macs", "params", "accuracy")) and all(
        math.isclose(mine[name], theirs[name], rel_tol=1e-4) for name in mine.keys() & theirs.keys()
    )


def _sums(network: dict[str, Any]) -> dict[str, float]:
    """What a record knows of sums over images, whose last digits go by the order of summing: losses on test and validation, AUC."""
    loss, validation = network.get("loss"), (network.get("validation") or {}).get("loss")
    found = {"loss": loss, "validation": validation, "auc": network.get("auc")}
    return {name: value for name, value in found.items() if value is not None}


def _unread(method: str) -> frozenset[str]:
    """Settings that a method does not read: they may differ."""
    found = {f"prune.{name}" for name in _FIXED.get(method, ())} | (_UNREAD if method in _TORCH_PRUNING else set())
    found |= {"search_minutes", "choices"} if method != "auto" else set()
    found |= _NOT_PRUNED.get(method, set()) | ({"removal.ranges"} if method in _RANGES_UNREAD else set())
    return frozenset(found | (_REMOVAL.keys() if method in _RESIDUALS_STAY else set()))


def _settings(record: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """(model, data, method, budget) of each network of a record -> the settings that it depends on."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in networks(record):
        dense = name in ("original", "plain")
        parts = _BEFORE | {"removal"} if name == "plain" else _BEFORE
        config = {key: record["config"].get(key) for key in parts} if dense else record["config"]
        method, budget = method_of(record, name), "" if dense else budget_of(record)
        mine = _REMOVAL | flat(config)
        if method in _BY_TIME or budget.startswith("latency"):
            mine |= counted_at(record["config"])
        found[model_of(record), dataset_name(record), method, budget] = mine
    return found


def counted_at(config: dict[str, Any]) -> dict[str, Any]:
    """Where a budget in time is counted, which decides the network: device, and first backend, thread number and batch size."""
    measure = config.get("measure") or {}
    firsts = {name: next(iter(measure.get(name) or [None])) for name in ("backends", "threads", "batch_sizes")}
    return {f"the first of measure.{name}": value for name, value in firsts.items()} | {
        "measure.device": measure.get("device", "cpu")
    }


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"finetune.epochs": 3, ...}, without what rows are told apart by."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _OWN:
            continue
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + key] = value
    return found
