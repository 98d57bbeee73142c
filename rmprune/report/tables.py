"""Records as tables: a row for each network and measurement; how numbers and places are written. Records are read, nothing is measured."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from rmprune.runs.records import RECORD, RENAMED, networks, read_record

COLUMNS = [
    "model", "dataset", "method", "budget", "seed", "accuracy", "balanced_accuracy", "auc", "macs", "params", "activation_bytes",
    "backend", "device", "threads", "batch_size", "median_ms", "q1_ms", "q3_ms", "ratio", "run",
]  # fmt: skip
_MAY_LACK = ("balanced_accuracy", "auc", "activation_bytes")
_SAME_PLACE = 1.1
"""Times of one dense network, longest over shortest, up to which records count as measured under the same conditions."""
_BUDGETS = ("latency_ratio", "macs_ratio", "params_ratio", "memory_ratio", "ratio")
CONFIGURATION = ["backend", "device", "threads", "batch_size"]


def find_setting(config: dict[str, Any], name: str) -> Any:
    """The value of setting `name`, at the top of `config` or in the first table that has it; None where none does."""
    if config.get(name) is not None:
        value = config[name]
        return value.get("name") if isinstance(value, dict) else value
    for table in config.values():
        if isinstance(table, dict) and (value := find_setting(table, name)) is not None:
            return value
    return None


def budget_of(record: dict[str, Any]) -> str:
    """What the pruned network was allowed, as "latency 0.5", "macs 0.25, memory 0.5" or "channels 0.7"; empty where nothing says
    so.

    Taken from the record's own `budget` ({"macs_ratio": 0.25}), else from its config.
    """
    own = record.get("budget")
    found = own if isinstance(own, dict) else {name: find_setting(record["config"], name) for name in _BUDGETS}
    kinds = [name for name in _BUDGETS if isinstance(found.get(name), int | float)]
    said = [f"{'channels' if name == 'ratio' else name.removesuffix('_ratio')} {found[name]:g}" for name in kinds]
    return ", ".join(said if found is own else said[:1])


def dataset_name(record: dict[str, Any]) -> str:
    """The name of the data set; empty where nothing says it."""
    return str(record.get("dataset") or find_setting(record["config"], "dataset") or "")


def model_of(record: dict[str, Any]) -> str:
    """The network's name, with the settings of its own that were asked for: "repvgg (depth 37, width 8)"."""
    config = record["config"]
    name = record.get("model") or find_setting(config, "model")
    own = [(key, find_setting(config, key)) for key in ("depth", "reserve_ratio", "width", "free")]
    said = [
        f"{key.replace('_', ' ')} {value:g}"
        for key, value in own
        if isinstance(value, int | float) and (key, value) != ("free", 1)
    ]
    return f"{name} ({', '.join(said)})" if said else str(name)


def method_of(record: dict[str, Any], network: str) -> str:
    """The method that made a network: its own `method`, else dense, plain, or the fitting part of the record's "rm,coupled"."""
    found = networks(record)
    own = found[network].get("method")
    if isinstance(own, str):
        return RENAMED.get(own, own)
    if network in ("original", "plain"):
        return "dense" if network == "original" else "plain"
    parts = [part.strip() for part in record["method"].split(",")]
    if network == "pruned":
        free = [part for part in parts if part not in found and not part.startswith("coupled")]
        return next((part for part in free if part.startswith("rm")), free[0] if free else "rm")
    return network if network in parts else next((part for part in parts if part.startswith(network)), network)


def rows(record: dict[str, Any], run: str) -> list[dict[str, Any]]:
    """One row (see COLUMNS) for each network and measurement of a record; `ratio` is the time over the original's."""
    original = {where_measured(latency): latency["median_ms"] for latency in record["original"]["latency"]}
    found = []
    for name, network in networks(record).items():
        shared = {
            "model": model_of(record),
            "dataset": dataset_name(record),
            "method": method_of(record, name),
            "budget": "" if name in ("original", "plain") else budget_of(record),
            "seed": record["seed"],
            "accuracy": network["accuracy"],
            "macs": network["macs"],
            "params": network["params"],
            **{name: math.nan if network.get(name) is None else network[name] for name in _MAY_LACK},
            "run": run,
        }
        for latency in network["latency"]:
            base = original.get(where_measured(latency))
            ratio = latency.get("ratio", latency["median_ms"] / base if base else None)
            times = {column: latency[column] for column in (*CONFIGURATION, "median_ms", "q1_ms", "q3_ms")}
            # As the backend computes it, below float32; what else is known of float32 alone is not said of it.
            below = latency.get("accuracy")
            own = {} if below is None else {"accuracy": below, "balanced_accuracy": math.nan, "auc": math.nan}
            found.append(shared | own | times | {"ratio": ratio})
    return found


def frame(records: list[Path]) -> pd.DataFrame:
    """All rows of all records, in COLUMNS order; a run is named by its directory."""
    return frame_of({path: read_record(path) for path in records})


def frame_of(records: dict[Path, dict[str, Any]]) -> pd.DataFrame:
    """`frame` of records that are read already, by their files; of those under a name of their own several may lie in a directory."""
    runs = {path: str(path.parent if path.name == RECORD else path) for path in records}
    found = [row for path, record in records.items() for row in rows(record, run=runs[path])]
    return pd.DataFrame(found, columns=COLUMNS)


def relative(data: pd.DataFrame) -> pd.DataFrame:
    """One row per method, budget and configuration, means over seeds, everything against the dense network.

    Columns: accuracy (0 to 1), its spread over seeds (standard deviation), its lowest and highest seed, accuracy_change
    (points), balanced_accuracy, auc and its spread (empty in older records), macs, params and their ratios, activation_bytes, time
    (median/q1/q3 in ms) and its ratio, seeds.
    """
    keys = ["model", "dataset", "method", "budget", *CONFIGURATION]
    data = data.reindex(columns=[*data.columns, *(name for name in COLUMNS if name not in data)])  # tables of before
    dense = data[data.method == "dense"].set_index(["run", *CONFIGURATION])
    dense = dense[~dense.index.duplicated()]
    base = dense.reindex(pd.MultiIndex.from_frame(data[["run", *CONFIGURATION]]))
    full = data.assign(
        accuracy_change=(data.accuracy.to_numpy() - base.accuracy.to_numpy()) * 100,
        macs_ratio=data.macs.to_numpy() / base.macs.to_numpy(),
        params_ratio=data.params.to_numpy() / base.params.to_numpy(),
    )
    numbers = [
        "accuracy", "accuracy_change", "balanced_accuracy", "auc", "macs", "macs_ratio", "params", "params_ratio", "activation_bytes",
        "median_ms", "q1_ms", "q3_ms", "ratio",
    ]  # fmt: skip
    # the networks that cells of a seed share stand in each of their records: one value a seed
    by_seed = full.groupby([*keys, "seed"], sort=False, dropna=False)[numbers].mean().reset_index()
    return (
        by_seed.groupby(keys, sort=False, dropna=False)
        .agg(
            **{name: (name, "mean") for name in numbers},
            accuracy_spread=("accuracy", _spread),
            auc_spread=("auc", _spread),
            accuracy_low=("accuracy", "min"),
            accuracy_high=("accuracy", "max"),
            seeds=("seed", "nunique"),
        )
        .reset_index()
    )


def measured_apart(data: pd.DataFrame) -> bool:
    """Whether the records took their times under different conditions, as their dense networks' times tell: milliseconds
    of such records do not compare, only ratios to each record's own dense network do.
    """
    times = data[data.method == "dense"].groupby(["model", "dataset", *CONFIGURATION], dropna=False).median_ms
    return bool((times.max() > _SAME_PLACE * times.min()).any())


def _spread(values: pd.Series) -> float:
    return float(values.std()) if len(values) > 1 else 0.0


def where_measured(latency: dict[str, Any]) -> tuple[Any, ...]:
    """Where a time of a record was taken, by CONFIGURATION."""
    return tuple(latency[column] for column in CONFIGURATION)


def amount(value: float) -> str:
    """A count with three digits and a unit: 1.81 G, 301 M, 12.3 k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def milliseconds(value: float) -> str:
    """A time with three digits: 0.417, 1.83, 73.7, 1240."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def configuration_label(configuration: Any, with_place: bool = True) -> str:
    """A (backend, device, threads, batch_size) as "onnxruntime, 2 threads, batch 1"; without its place, as on the screen."""
    backend, _, _, batch_size = configuration
    return ", ".join([backend, *([place_name(configuration)] if with_place else []), f"batch {batch_size}"])


def place_name(configuration: Any) -> str:
    """Where it ran: "2 threads" of the CPU, or the GPU."""
    _, device, threads, _ = configuration
    return f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else device
