"""The figure: accuracy against measured time, one panel for each backend, thread count and batch size. It only draws
what tables.py gives.
"""

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from rmprune.report.tables import CONFIGURATION, configuration_label, measured_apart, milliseconds, relative
from rmprune.runs.writing import whole

# Okabe and Ito's palette: told apart with every kind of colour vision, and by marker besides.
_KNOWN = {"dense": ("#000000", "*", 150), "plain": ("#7f7f7f", "D", 42)}
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B6508"]
_MARKERS = ["o", "s", "^", "v", "P", "X", "h"]
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "rmprune",
}
_MAX_LABELS = 12


def accuracy_against_time(data: pd.DataFrame, title: str) -> Figure:
    """Accuracy (%) against median time (ms) of the rows `data` (tables.frame) of one model and data set.

    A point is the mean over seeds; horizontal whiskers are the quartiles of the time, vertical ones the standard
    deviation over seeds. The grey line is the Pareto front: nothing measured is both faster and better. Records that were
    measured under different conditions are drawn by their ratios to their own dense networks, not in ms.
    """
    summary, unit = _timed(relative(data), in_ratios=measured_apart(data))
    styles = _styles(list(dict.fromkeys(summary.method)))
    panels = list(summary.groupby(CONFIGURATION, sort=False))
    columns = min(len(panels), max(1, summary.batch_size.nunique()), 3)
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(4.4 * columns, 5.2), 3.6 * lines + 0.9), layout="constrained")
        renderer = FigureCanvasAgg(figure).get_renderer()
        axes = figure.subplots(lines, columns, squeeze=False)
        for ax, (key, panel) in zip(axes.flat, panels, strict=False):
            _draw_panel(ax, panel, styles)
            ax.set_title(configuration_label(key), loc="left")
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_visible(False)
        for ax in axes.flat:
            ax.set_xlabel(unit)
        for ax in axes[:, 0]:
            ax.set_ylabel("test accuracy (%)")
        handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        ordered = [name for name in (*styles, "Pareto front") if name in handles]
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
        for entries in range(min(len(ordered), 2 + 2 * columns), 0, -1):  # as many in a line as the figure has room for
            legend = figure.legend(
                [handles[name] for name in ordered],
                ordered,
                loc="outside lower center",
                ncols=entries,
                handletextpad=0.4,
            )
            if entries == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
                break
            legend.remove()
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes `stem`.png (160 dots per inch) and `stem`.svg; the same data give the same files."""
    paths = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")]
    with matplotlib.rc_context(STYLE), whole(paths[0]) as png, whole(paths[1]) as svg:
        figure.savefig(png, dpi=160, format="png")
        figure.savefig(svg, metadata={"Date": None}, format="svg")
    return paths


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (time, accuracy) points that no other beats in both, fastest first."""
    front: list[tuple[float, float]] = []
    for time, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((time, accuracy))
    return front


def _styles(methods: list[str]) -> dict[str, tuple[str, str, int]]:
    """Colour, marker and size of every method, dense and plain first; the same methods always look the same."""
    ours_first = sorted((m for m in methods if m not in _KNOWN), key=lambda m: (not m.startswith(("rm", "mixed")), m))
    turns = range(len(_MARKERS))  # each turn pairs the colours with other markers
    looks = [(colour, _MARKERS[(n + turn) % len(_MARKERS)]) for turn in turns for n, colour in enumerate(_COLOURS)]
    known = {method: style for method, style in _KNOWN.items() if method in methods}
    return known | {method: (*look, 52) for method, look in zip(ours_first, itertools.cycle(looks))}


def _timed(summary: pd.DataFrame, in_ratios: bool) -> tuple[pd.DataFrame, str]:
    """`summary` with the columns that are drawn, time, time_q1 and time_q3, and what they are."""
    scale = summary.ratio / summary.median_ms if in_ratios else 1.0
    unit = "measured time, dense network = 1" if in_ratios else "measured time for a batch (ms)"
    times = {"time": summary.median_ms * scale, "time_q1": summary.q1_ms * scale, "time_q3": summary.q3_ms * scale}
    return summary.assign(**times), unit


def _draw_panel(ax: Axes, panel: pd.DataFrame, styles: dict[str, tuple[str, str, int]]) -> None:
    front = pareto_front(list(zip(panel.time, panel.accuracy * 100, strict=True)))
    if len(front) > 1:
        xs, ys = zip(*front, strict=True)
        ax.plot(xs, ys, color="#b0b0b0", linewidth=1.4, drawstyle="steps-post", zorder=1, label="Pareto front")
    for method, (colour, marker, size) in styles.items():
        own = panel[panel.method == method].sort_values("time")
        if own.empty:
            continue
        ax.errorbar(
            own.time,
            own.accuracy * 100,
            xerr=[(own.time - own.time_q1).clip(lower=0), (own.time_q3 - own.time).clip(lower=0)],
            yerr=own.accuracy_spread * 100 if (own.accuracy_spread > 0).any() else None,
            fmt="none",
            ecolor=colour,
            elinewidth=1.1,
            capsize=2.5,
            alpha=0.75,
            zorder=2,
        )
        ax.scatter(
            own.time,
            own.accuracy * 100,
            s=size,
            c=colour,
            marker=marker,
            edgecolors="white",
            linewidths=0.7,
            zorder=3,
            label=method,
        )
    if panel.budget.nunique() > 2 and (panel.budget != "").sum() <= _MAX_LABELS:
        for row in panel[panel.budget != ""].to_dict("records"):
            _label(ax, row, styles[row["method"]][0], above=list(styles).index(row["method"]) % 2 == 0)
    _scale(ax, panel)


def _label(ax: Axes, row: Any, colour: str, above: bool) -> None:
    """The budget beside its point; methods alternate sides, for at one budget they lie close together."""
    place, text = (row["time"], row["accuracy"] * 100), row["budget"].split()[-1]
    offset, side = ((-5, 5), "right") if above else ((5, -10), "left")
    ax.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=7.5, color=colour, ha=side)


def _scale(ax: Axes, panel: pd.DataFrame) -> None:
    """Room around the points; a logarithmic time axis, with plain numbers, where times span more than a factor of
    five.
    """
    low, high = float(panel.time_q1.min()), float(panel.time_q3.max())
    if high > 5 * low:
        ax.set_xscale("log")
        ax.set_xlim(low / 1.4, high * 1.3)
        ticks = [t for t in (d * 10.0**e for e in range(-4, 6) for d in (1, 2, 5)) if low / 1.4 <= t <= high * 1.3]
        ax.set_xticks(ticks)
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.12 * (high - low) or 0.1 * high
        ax.set_xlim(max(0.0, low - room), high + room)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: milliseconds(value)))
    accuracy = panel.accuracy * 100
    room = max(0.15 * (accuracy.max() - accuracy.min()), 0.2)
    ax.set_ylim(accuracy.min() - room, min(accuracy.max() + room, 100.4))
