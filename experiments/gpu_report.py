"""Figures and page of what `gpu.py` measured, from its CSV alone: `python experiments/gpu.py --figures DIR`. Measures nothing."""

import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("agg")
import matplotlib.pyplot as plt

PAPER = 1.36  # times MobileNetV2's images per second, the least of the paper's V1 forms
LOOP = 5.0  # times a plain loop's images per second
OURS = ("auto", "rm-amc", "rm")
RIVALS = ("residual-amc", "coupled", "coupled-taylor")
NO_TIME = ("no time was left", "time was up")
PARTS = ("exactness", "speed", "additions", "training", "accuracy", "solar")


def draw(folder: Path) -> list[Path]:
    """The figures and page.md of the CSV files below a folder: all rows of all times, card by card."""
    everything = {name: complete(read(folder, name)) for name in PARTS}
    cards = sorted({card for rows in everything.values() if not rows.empty for card in rows.card})
    made, lines = [], heading(folder)
    for card in cards:
        tables = {name: rows if rows.empty else rows[rows.card == card] for name, rows in everything.items()}
        lines += ["", f"# {card}", "", *(f"- {line}" for line in goals(tables)), ""]
        for name, rows in tables.items():
            if rows.empty:
                continue
            lines += [f"## {name.capitalize()}", "", table(rows), ""]
            if name in FIGURES:
                plt.close("all")
                made.append(folder / f"{'-'.join([name, *(card.split() if len(cards) > 1 else [])])}.png")
                FIGURES[name](rows).savefig(made[-1], dpi=150, bbox_inches="tight")
    page = folder / "page.md"
    page.write_text("\n".join(lines))
    return [*made, page]


def read(folder: Path, name: str) -> pd.DataFrame:
    """All rows of one part; empty where it did not run."""
    found = [pd.read_csv(path) for path in sorted(folder.rglob(f"{name}.csv"))]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each seed of a comparison the training with the most networks: one that time cut short is begun anew another time."""
    if "begun" not in rows:
        return rows
    own = ["card", "comparison", "seed"]
    sizes = rows.groupby([*own, "begun"]).size().rename("networks").reset_index().sort_values(["networks", "begun"])
    return rows.merge(sizes.drop_duplicates(own, keep="last")[[*own, "begun"]])


def speed_figure(rows: pd.DataFrame) -> "plt.Figure":
    """Speed over the original by form, a bar for each backend, a panel for each network and batch size."""
    panels, backends = list(rows.groupby(["network", "batch_size"], sort=False)), list(rows.backend.unique())
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 2.6 * len(panels)), squeeze=False)
    for axis, ((network, batch), part) in zip(axes[:, 0], panels, strict=True):
        table = part.pivot_table(index="form", columns="backend", values="speed_up", sort=False)
        colours = [f"C{backends.index(backend)}" for backend in table.columns]
        table.plot.bar(ax=axis, rot=0, width=0.8, color=colours, legend=False)
        axis.legend(ncols=len(colours), loc="lower left", fontsize="small")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"{network}, batch {batch}", ylabel="times as fast", xlabel="")
    figure.tight_layout()
    return figure


def additions_figure(rows: pd.DataFrame) -> "plt.Figure":
    """What an addition costs: time of the network over that of the same layers without them, by backend and batch size."""
    table = cost_of_additions(rows)
    figure, axis = plt.subplots(figsize=(10, 4))
    table.pivot_table(index=["network", "batch_size"], columns="backend", values="cost", sort=False).plot.bar(
        ax=axis, rot=20
    )
    axis.set(ylabel="additions, % of the time without", xlabel="")
    return figure


def cost_of_additions(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each network, backend and batch size, with `cost` in per cent."""
    whole = rows[rows.form == "with"]
    return whole.assign(cost=100 * (1 / whole.speed_up - 1))[["network", "backend", "batch_size", "cost"]]


def accuracy_figure(rows: pd.DataFrame) -> "plt.Figure":
    """Accuracy against measured time, a point for each network and seed, a panel for each comparison."""
    panels = list(rows.groupby("comparison", sort=False))
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (comparison, part) in zip(axes[0], panels, strict=True):
        for method, points in part.groupby("method", sort=False):
            axis.plot(points.time_ratio, 100 * points.accuracy, "o", label=method, alpha=0.7)
        axis.set(title=comparison, xlabel="time over the original's", ylabel="test accuracy, %")
        axis.legend()
    return figure


def training_figure(rows: pd.DataFrame) -> "plt.Figure":
    """Images per second of each loop, the median of its turns."""
    rates = rows.groupby(["loop", "workers"], sort=False).images_per_second.median()
    figure, axis = plt.subplots(figsize=(6, 2.5))
    axis.barh([f"{loop}, {workers} workers" for loop, workers in rates.index], rates)
    axis.set(xlabel="images per second, training")
    return figure


FIGURES = {
    "speed": speed_figure,
    "additions": additions_figure,
    "training": training_figure,
    "accuracy": accuracy_figure,
    "solar": accuracy_figure,
}


def goals(tables: dict[str, pd.DataFrame]) -> list[str]:
    """What the tables say of the goals, a line each."""
    lines = []
    if not (rows := tables["speed"]).empty:
        forms = rows[(rows.network == "mobilenet_v2") & (rows.batch_size >= 32) & rows.form.str.match(r"RM \d")]
        least = forms.groupby(["form", "backend"]).speed_up.min()
        for form, by_backend in least.groupby("form", sort=False):
            enough = [backend for (_, backend), value in by_backend.items() if value >= PAPER]
            said = (
                f"at least {PAPER} times in {len(enough)} of {len(by_backend)} backends ({', '.join(enough) or 'none'})"
            )
            lines.append(f"V1 form, {form} of its MACs, batch 32 and more: {said}.")
    if not (rows := tables["additions"]).empty:
        for (backend, batch), part in cost_of_additions(rows).groupby(["backend", "batch_size"], sort=False):
            lines.append(
                f"Additions, {backend}, batch {batch}: {part.cost.min():.1f} to {part.cost.max():.1f} % of the time."
            )
    if not (rows := tables["training"]).empty:
        rates = rows.groupby(["loop", "workers"]).images_per_second.median()
        plain = rates["plain"].max()
        ratio = rates["rmprune"].max() / plain
        lines.append(f"Training loop: {ratio:.2f} times the plain loop's {plain:,.0f} images/s (goal: {LOOP:g}).")
    for name in ("accuracy", "solar"):
        for comparison, part in () if tables[name].empty else tables[name].groupby("comparison", sort=False):
            lines += [
                over_front(str(comparison), part, own, base)
                for own in OURS
                for base in part.method.unique()
                if base in RIVALS and own in set(part.method)
            ]
    return lines


def over_front(comparison: str, rows: pd.DataFrame, own: str, base: str) -> str:
    """How far a method lies above a rival at its measured time, seed by seed: the rival's best of so much time or less, linear in log
    time between its networks, beyond them the nearest. The rival's next slower network needs no such line, and favours it.
    """
    gains, surely, seeds = [], 0, 0
    for _, part in rows.groupby("seed"):
        front = part[part.method.isin([base, "original"])].groupby("time_ratio", as_index=False).accuracy.max()
        times, best = front.time_ratio.to_numpy(), np.maximum.accumulate(front.accuracy.to_numpy())
        mine = part[part.method == own]
        seeds += not mine.empty and base in set(part.method)
        for row in mine.itertuples() if base in set(part.method) else ():
            gains.append(100 * (row.accuracy - np.interp(math.log(row.time_ratio), np.log(times), best)))
            surely += row.accuracy > best[min(np.searchsorted(times, row.time_ratio), len(best) - 1)]
    if not gains:
        return f"{comparison}: {own} and {base} were measured with no seed in common."
    above = sum(gain > 0 for gain in gains)
    return (
        f"{comparison}: {own} lies {min(gains):+.2f} to {max(gains):+.2f} points over {base} at equal measured time; above in {above} of "
        f"{len(gains)} networks ({surely} are above its next slower network too), {seeds} seeds."
    )


def heading(folder: Path) -> list[str]:
    """Where it was measured, by which commands, and what was left out."""
    lines = ["# Measured by experiments/gpu.py", ""]
    for path in sorted(folder.rglob("run-*.json")):
        run = json.loads(path.read_text())
        here, versions = run["environment"], run["environment"]["versions"]
        place = here["gpu"] or f"{here['processor']}: a CPU, which says nothing of GPUs"
        lines += [
            f"- `{run['command']}` on {place}; torch {versions['torch']}, Python {versions['python']}; seconds: "
            + ", ".join(f"{name} {took:g}" for name, took in run["seconds"].items()),
            *(f"  - left out: {what}" for what in run["left_out"] if not what.endswith(NO_TIME)),
        ]
        if short := sum(what.endswith(NO_TIME) for what in run["left_out"]):
            lines.append(f"  - left out because the time was up: {short} measurements")
    return lines


def table(rows: pd.DataFrame) -> str:
    """As markdown; columns that say nothing are left out."""
    rows = rows.dropna(axis=1, how="all").drop(columns=["card", "begun", "q1_ms", "q3_ms", "first_ms"], errors="ignore")
    cells = [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
        for row in rows.itertuples(index=False)
    ]
    heads = [str(column).replace("_", " ") for column in rows.columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells))
