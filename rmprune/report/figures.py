"""The figure for print: accuracy against measured time, one panel for each backend, thread count and batch size. It only
draws what tables.py gives.
"""

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from rmprune.report.looks import Look, looks, ranked
from rmprune.report.tables import CONFIGURATION, configuration_label, measured_apart, milliseconds, relative
from rmprune.runs.writing import whole

STYLE: Any = {
    "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.grid": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False, "svg.fonttype": "none",
    "svg.hashsalt": "rmprune",
}  # fmt: skip
_NAME_SIZE, _LINE, _LONGEST = 8.0, 0.155, 24  # points, inches from one name to the next, and characters
_READING = "Points: means over seeds, joined by method. Bars: lowest to highest seed; quartiles of the time. "
_REST = "Grey steps: the front, beaten by nothing in both. Dotted: the dense network."


def accuracy_against_time(data: pd.DataFrame, title: str, styles: dict[str, Look] | None = None) -> Figure:
    """Accuracy (%) against median time (ms) of the rows `data` (tables.frame) of one model and data set.

    A point is the mean over seeds; vertical bars go from the lowest to the highest seed, horizontal ones over the quartiles of
    the time; dotted lines are the dense network, grey steps the Pareto front. Names stand beside each panel, led to their
    points; `styles` says how methods look where other figures show them too. Records that were measured under different
    conditions are drawn by their ratios to their own dense networks, not in ms.
    """
    summary, unit = _timed(relative(data), in_ratios=measured_apart(data))
    styles = styles or looks(ranked(data))
    styles = {method: styles[method] for method in styles if method in set(data.method)}
    panels = list(summary.groupby(CONFIGURATION, sort=False))
    columns = min(len(panels), max(1, summary.batch_size.nunique()), 2)
    lines = -(-len(panels) // columns)
    height = max(3.2, _LINE * len(styles) + 0.9)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.9 * columns, height * lines + 0.9), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        for ax, (key, panel) in zip(axes.flat, panels, strict=False):
            _draw_panel(ax, panel, styles)
            ax.set_title(configuration_label(key), loc="left", parse_math=False)
            _write_names(ax, panel, styles, height)
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_visible(False)
        for ax in axes.flat:
            ax.set_xlabel(unit)
        for ax in axes[:, 0]:
            ax.set_ylabel("test accuracy (%)")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12, parse_math=False)
        reading = _READING + ("\n" if columns == 1 else "") + _REST
        figure.supxlabel(reading, x=0.01, ha="left", fontsize=8, color="#555555")
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes `stem`.png (160 dots per inch) and `stem`.svg; the same data give the same files."""
    paths = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")]
    with matplotlib.rc_context(STYLE), whole(paths[0]) as png, whole(paths[1]) as svg:
        figure.savefig(png, dpi=160, format="png")
        figure.set_layout_engine("none")  # it is laid out, which is a third of the time
        figure.savefig(svg, metadata={"Date": None}, format="svg")
    return paths


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (time, accuracy) points that no other beats in both, fastest first."""
    front: list[tuple[float, float]] = []
    for time, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((time, accuracy))
    return front


def spread_apart(places: list[float], least: float, top: float) -> list[float]:
    """`places`, sorted, moved as little as simple pushing allows until neighbours are `least` apart and none is above `top`."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + least) if moved else place)
    limit = top
    for position in reversed(range(len(moved))):
        moved[position] = min(moved[position], limit)
        limit = moved[position] - least
    return moved


def _timed(summary: pd.DataFrame, in_ratios: bool) -> tuple[pd.DataFrame, str]:
    """`summary` with the columns that are drawn, time, time_q1 and time_q3, and what they are."""
    scale = summary.ratio / summary.median_ms if in_ratios else 1.0
    unit = "measured time, dense network = 1" if in_ratios else "measured time for a batch (ms)"
    times = {"time": summary.median_ms * scale, "time_q1": summary.q1_ms * scale, "time_q3": summary.q3_ms * scale}
    return summary.assign(**times), unit


def _draw_panel(ax: Axes, panel: pd.DataFrame, styles: dict[str, Look]) -> None:
    for dense in panel[panel.method == "dense"].to_dict("records"):
        reference: Any = {"color": "#000000", "linewidth": 0.9, "linestyle": (0, (1, 2.5)), "zorder": 1}
        ax.axhline(dense["accuracy"] * 100, **reference)
        ax.axvline(dense["time"], **reference)
    front = pareto_front(list(zip(panel.time, panel.accuracy * 100, strict=True)))
    if len(front) > 1:
        xs, ys = zip(*front, strict=True)
        ax.plot(xs, ys, color="#b0b0b0", linewidth=3.2, alpha=0.55, drawstyle="steps-post", zorder=1)
    for method, look in styles.items():
        own = panel[panel.method == method].sort_values("time")
        if own.empty:
            continue
        ax.plot(own.time, own.accuracy * 100, color=look.colour, linewidth=0.8, alpha=0.45, zorder=2)
        ax.errorbar(
            own.time,
            own.accuracy * 100,
            xerr=[(own.time - own.time_q1).clip(lower=0), (own.time_q3 - own.time).clip(lower=0)],
            yerr=[(own.accuracy - own.accuracy_low) * 100, (own.accuracy_high - own.accuracy) * 100],
            fmt="none",
            ecolor=look.colour,
            elinewidth=1.0,
            alpha=0.75,
            zorder=2,
        )
        ax.scatter(
            own.time,
            own.accuracy * 100,
            s=150 if method == "dense" else 50,
            c=look.colour,
            marker=look.print_marker,
            edgecolors="white",
            linewidths=0.7,
            zorder=3,
            label=method,
        )
    _scale(ax, panel)


def _write_names(ax: Axes, panel: pd.DataFrame, styles: dict[str, Look], height: float) -> None:
    """The methods' names and markers in a column right of the panel, each led to its slowest point."""
    slowest = panel.sort_values("time").drop_duplicates("method", keep="last").sort_values("accuracy")
    low, high = ax.get_ylim()
    wanted = list((100 * slowest.accuracy - low) / (high - low))
    for row, place in zip(slowest.to_dict("records"), spread_apart(wanted, _LINE / (height - 0.9), 1.0), strict=True):
        look, name, accuracy = styles[row["method"]], _short(row["method"]), 100 * row["accuracy"]
        ax.annotate(
            "",
            (row["time"], accuracy),
            xytext=(1.02, place),
            textcoords="axes fraction",
            annotation_clip=False,
            zorder=1,
            arrowprops={
                "arrowstyle": "-",
                "color": look.colour,
                "linewidth": 0.5,
                "alpha": 0.35,
                "shrinkA": 0,
                "shrinkB": 4,
            },
        )
        beside: Any = {"color": look.colour, "transform": ax.transAxes, "clip_on": False}
        ax.plot([1.035], [place], look.print_marker, markersize=5, **beside)
        text = f"dense, {accuracy:.2f} %" if name == "dense" else name
        ax.text(1.065, place, text, fontsize=_NAME_SIZE, va="center_baseline", parse_math=False, **beside)


def _short(name: str) -> str:
    """A name as far as there is room beside a panel."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _scale(ax: Axes, panel: pd.DataFrame) -> None:
    """Room around the points; a logarithmic time axis, with plain numbers, where times span more than a factor of five."""
    low, high = float(panel.time_q1.min()), float(panel.time_q3.max())
    if high > 5 * low:
        ax.set_xscale("log")
        ax.set_xlim(low / 1.2, high * 1.2)
        ticks = [t for t in (d * 10.0**e for e in range(-4, 6) for d in (1, 2, 5)) if low / 1.2 <= t <= high * 1.2]
        ax.set_xticks(ticks)
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.08 * (high - low) or 0.1 * high
        ax.set_xlim(max(0.0, low - room), high + room)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: milliseconds(value)))
    low, high = 100 * panel.accuracy_low.min(), 100 * panel.accuracy_high.max()
    room = max(0.06 * (high - low), 0.1)
    ax.set_ylim(low - room, min(high + room, 100.4))
