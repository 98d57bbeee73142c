"""A record on the screen: tables of accuracy, cost, time, classes and layers, and what its budget left out. It computes nothing."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from rmprune.report.tables import (
    amount,
    budget_of,
    configuration_label,
    milliseconds,
    model_of,
    place_name,
    where_measured,
)
from rmprune.runs.records import networks

MOST_CLASSES = 20  # that are shown one by one


def headed(title: str, *headings: str, words: int = 1, fold: bool = False) -> Table:
    """An empty table for the screen: the first so many columns hold words, the others numbers. `fold`: the first alone breaks."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for place, heading in enumerate(headings):
        breaks: Any = {"overflow": "fold", "no_wrap": place > 0} if fold else {}
        table.add_column(escape(heading), justify="left" if place < words else "right", **breaks)
    return table


def refusals(record: dict[str, Any]) -> list[str]:
    """A sentence for each method that the record's budget left out."""
    where = f"{model_of(record)}, seed {record['seed']}, {budget_of(record)}"
    return [f"{where}: without {name}, as {why}" for name, why in record.get("refused", {}).items()]


def summary_tables(record: dict[str, Any]) -> list[Table]:
    """What a record says, for the screen: one table of accuracy and cost, one of time, relative to the original."""
    found = networks(record)
    original = found["original"]
    score, scale, form = ("loss", 1, "{:.4g}") if original["accuracy"] is None else ("accuracy", 100, "{:.2%}")
    title = f"{score.capitalize()} and cost, relative to the original"
    cost = headed(title, "network", score, "change", "MACs", "", "parameters", "")
    for name, network in found.items():
        change = (network[score] - original[score]) * scale
        cells = [escape(name), form.format(network[score]), "" if name == "original" else f"{change:+.2f}"]
        for field in ("macs", "params"):
            cells += [amount(network[field]), f"{network[field] / original[field]:.2f}x"]
        cost.add_row(*cells)
    places = {place_name(where_measured(latency)) for latency in original["latency"]}
    where = f" on {next(iter(places))}" if len(places) == 1 else ""
    time = headed(f"Measured time{where} (ms for a batch, median)", "measured with", *found)
    times = {
        name: {where_measured(latency): latency for latency in network["latency"]} for name, network in found.items()
    }
    for key, base in times["original"].items():
        cells = [escape(configuration_label(key, with_place=len(places) > 1))]
        for own in times.values():
            latency = own.get(key)
            if latency is None:
                cells.append("")
                continue
            ratio = latency.get("ratio", latency["median_ms"] / base["median_ms"])
            cells.append(f"{milliseconds(latency['median_ms'])}  {ratio:.2f}x")
        time.add_row(*cells)
    profiles = [profile_table(name, network["profile"]) for name, network in found.items() if network.get("profile")]
    return [cost, *([time] if times["original"] else []), *_by_class(found), *profiles]


def profile_table(network: str, profile: dict[str, Any]) -> Table:
    """Where the time of a network goes: a row for each kernel that the runtime ran, in order. MACs are of one image, ms of a batch."""
    place = configuration_label((profile["backend"], "cpu", profile["threads"], profile["batch_size"]))
    headings = ("layer", "operator", "channels", "MACs", "ms", "share")
    table = headed(f"{network}, layer by layer: {place}", *headings, words=2, fold=True)
    for row in profile["layers"]:
        widths = f"{row['cin']} to {row['cout']}" if row.get("cout") else ""
        macs = amount(row["macs"]) if row.get("macs") else ""
        cells = (row["operator"], widths, macs, milliseconds(row["ms"]), f"{row['share']:.1%}")
        table.add_row(escape(row["layer"]), *map(escape, cells))
    return table


def _by_class(found: dict[str, dict[str, Any]]) -> list[Table]:
    """Where classes have names: what each network recognises of each, and the measures that do not depend on how many images one has."""
    classes = found["original"].get("classes", [])
    names = [one["name"] for one in classes]
    if len(names) > MOST_CLASSES or names == [str(number) for number in range(len(names))]:
        return []
    table = headed("Recognised, of each class", "class", "images", *found)
    recalls = [{one["name"]: one["recall"] for one in network.get("classes", [])} for network in found.values()]
    for one in classes:
        shown = [recall.get(one["name"]) for recall in recalls]
        table.add_row(escape(one["name"]), str(one["images"]), *("" if r is None else f"{r:.1%}" for r in shown))
    for label, field, form in (
        ("all alike (balanced accuracy)", "balanced_accuracy", "{:.1%}"),
        ("AUC", "auc", "{:.3f}"),
    ):
        values = [network.get(field) for network in found.values()]
        table.add_row(label, "", *("" if value is None else form.format(value) for value in values))
    return [table]
