"""What the page draws, as one JSON value: points, networks, runs and machines of the records. Computed here, only drawn there."""

import json
from typing import Any

import pandas as pd

from rmprune.report.gather import Records
from rmprune.report.looks import SERIES_AT_ONCE, looks, ranked
from rmprune.report.tables import CONFIGURATION, budget_of, dataset_name, measured_apart, method_of, model_of, relative
from rmprune.runs.records import networks

_POINT = (
    "accuracy", "accuracy_low", "accuracy_high", "accuracy_change", "macs", "macs_ratio", "params", "params_ratio",
    "activation_bytes",
)  # fmt: skip
_TIME = ("median_ms", "q1_ms", "q3_ms", "ratio")
_DIGITS = 6
_MOST_KERNELS = 4000  # of 0.1 KB each
_BELOW_FLOAT32 = ("int8", "bfloat16", "float16", "tf32")


def payload(data: pd.DataFrame, records: Records, left_out: list[str], command: str) -> dict[str, Any]:
    """JSON of a report. `data`: frame_of(records).

    `points` are means over seeds (tables.relative), one for each method, budget and place of measuring, and name the
    `networks` that they are means of; a network has its run, its plan and its widths, whose layers stand in `skeletons`.
    """
    groups = list(dict.fromkeys(_group(record) for record in records.values()))
    skeletons: dict[str, int] = {}
    runs: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for path, record in records.items():
        for name, network in networks(record).items():
            outline = _outline(network, skeletons)
            found.append(_network(record, name, network, len(runs), groups) | outline)
        runs.append(_run(str(path.parent), record, groups))
    if sum(len(network.get("profile", {}).get("layers", ())) for network in found) > _MOST_KERNELS:
        for network in found:
            network.pop("profile", None)
        left_out = [*left_out, f"where the time goes, layer by layer: over {_MOST_KERNELS} rows; report fewer runs"]
    named = dict.fromkeys([*ranked(data), *(network["method"] for network in found)])  # measured ones first
    methods = [
        {"name": name, "colour": look.number, "marker": look.marker} for name, look in looks(list(named)).items()
    ]
    places = data[CONFIGURATION].drop_duplicates().to_dict("records")
    return {
        "command": command, "apart": measured_apart(data), "groups": groups, "methods": methods,
        "at_once": SERIES_AT_ONCE, "places": [_place(place) for place in places],
        "points": _points(data, groups, places, found), "networks": found,
        "skeletons": [json.loads(skeleton) for skeleton in skeletons], "runs": runs,
        "left_out": left_out + _refused(records),
    }  # fmt: skip


def _place(place: dict[Any, Any]) -> dict[str, Any]:
    """Where time was measured; a number format below float32, which ends a backend's name, apart from the runtime."""
    runtime, _, last = str(place["backend"]).rpartition("-")
    return place | {"backend": runtime, "number_format": last} if last in _BELOW_FLOAT32 else place


def _refused(records: Records) -> list[str]:
    """A sentence for each method that a budget left out, with the seeds it was left out for."""
    seeds: dict[str, list[str]] = {}
    for record in records.values():
        for name, why in record.get("refused", {}).items():
            line = f"{_group(record)}, {budget_of(record)}: without {name}, as {why}"
            seeds.setdefault(line, []).append(str(record["seed"]))
    return [f"{line} (seed {', '.join(dict.fromkeys(own))})" for line, own in seeds.items()]


def _points(data: pd.DataFrame, groups: list[str], places: list[Any], found: list[Any]) -> list[dict[str, Any]]:
    made_of: dict[tuple[Any, ...], list[int]] = {}
    for number, network in enumerate(found):
        made_of.setdefault((network["group"], network["method"], network["budget"]), []).append(number)
    points = []
    for row in relative(data).to_dict("records"):
        key = (groups.index(_title(row["model"], row["dataset"])), row["method"], row["budget"])
        point = dict(zip(("group", "method", "budget"), key, strict=True)) | {"networks": made_of[key]}
        point["place"] = places.index({column: row[column] for column in CONFIGURATION})
        point |= {name: _rounded(row[name]) for name in (*_POINT, *_TIME)}
        points.append(point | {"seeds": int(row["seeds"])})
    return points


def _network(record: dict[str, Any], name: str, network: dict[str, Any], run: int, groups: list[str]) -> dict[str, Any]:
    """One network with its plan: what the record says of its residuals, collapsed blocks, candidates and search."""
    found = {key: network[key] for key in ("accuracy", "macs", "params")}
    found |= {"run": run, "name": name, "method": method_of(record, name), "group": groups.index(_group(record))}
    found |= {"seed": record["seed"], "budget": "" if name in ("original", "plain") else budget_of(record)}
    more = {key: network.get(key) for key in ("collapsed", "candidates", "plan", "chosen", "profile")}
    more["removal"] = record["removal"] if name == "plain" else network.get("removal")
    more["search"] = _search(network.get("search") or {}) or None
    return found | {key: value for key, value in more.items() if value is not None}


def _outline(network: dict[str, Any], skeletons: dict[str, int]) -> dict[str, Any]:
    """The widths of a network and the number of its skeleton: layers and residuals, which many networks have in common."""
    layers, residuals = network.get("layers"), network.get("residuals")
    if layers is None or residuals is None:
        return {}
    skeleton = json.dumps({"layers": [[layer["name"], _kind(layer)] for layer in layers], "residuals": residuals})
    return {"skeleton": skeletons.setdefault(skeleton, len(skeletons)), "widths": [layer["cout"] for layer in layers]}


def _kind(layer: dict[str, Any]) -> str:
    """A layer besides its widths: "3x3 convolution, stride 2, in groups, 14x14"."""
    if "kernel" not in layer:
        return "linear"
    said = [f"{'x'.join(map(str, layer['kernel']))} convolution"]
    said += [f"stride {layer['stride'][0]}"] if max(layer["stride"]) > 1 else []
    said += ["in groups"] if layer["groups"] > 1 else []
    return ", ".join([*said, "x".join(map(str, layer["size"]))])


def _search(search: dict[str, Any]) -> dict[str, Any]:
    """A search with its episodes as columns: there are many."""
    if (episodes := search.get("episodes")) is None:
        return search
    rewards = [_rounded(episode["reward"]) for episode in episodes]
    return search | {"episodes": {"reward": rewards, "source": [episode["source"] for episode in episodes]}}


def _run(name: str, record: dict[str, Any], groups: list[str]) -> dict[str, Any]:
    found = {key: record[key] for key in ("command", "seed", "removal")} | {"name": name, "budget": budget_of(record)}
    found |= {"group": groups.index(_group(record)), "machine": machine(record["environment"])}
    found["training"] = {
        label: [_rounded(epoch.get("validation_accuracy")) for epoch in epochs]
        for label, epochs in (record.get("training") or {}).items()
    }
    return found


def machine(environment: dict[str, Any]) -> str:
    """Where a record was measured, in a line: processor, cores, GPU and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    cores, instructions = environment.get("cores"), environment.get("instructions")
    parts = [environment["processor"], f"{cores} cores" if cores else None, instructions, environment.get("gpu")]
    return f"{', '.join(str(part) for part in parts if part)}: {versions}"


def _group(record: dict[str, Any]) -> str:
    return _title(model_of(record), dataset_name(record))


def _title(model: Any, dataset: Any) -> str:
    return f"{model} on {dataset}"


def _rounded(value: Any) -> Any:
    """A number with six digits, None where there is none."""
    if not isinstance(value, int | float) or value != value:
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.{_DIGITS}g}")
