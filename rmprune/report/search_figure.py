"""The figure of a width search: reward over episodes, and the widths chosen. It draws what a record says under `search`."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmprune.report.figures import STYLE
from rmprune.report.looks import COLOURS
from rmprune.runs.records import networks

_SOURCES = {  # colour and label of where a policy came from
    "warm-up": ("#7f7f7f", "warm-up (random)"),
    "random": ("#7f7f7f", "random"),
    "agent": (COLOURS[0], "agent"),
    "refined": (COLOURS[1], "best so far, varied"),
    "uniform": (COLOURS[2], "uniform"),
}


def searches(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Network -> what its search found, for the networks of a record that came from a search of widths."""
    found = {name: network.get("search") for name, network in networks(record).items()}
    drawn = ("widths", "episodes", "verified_ratio")
    return {n: s for n, s in found.items() if isinstance(s, dict) and all(s.get(key) is not None for key in drawn)}


def search_figure(record: dict[str, Any]) -> Figure | None:
    """One row for each search of the record: rewards, widths. None where it has none."""
    found = searches(record)
    if not found:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1 * len(found) + 0.5), layout="constrained")
        rows = figure.subplots(len(found), 2, squeeze=False)
        for (name, search), (rewards, widths) in zip(found.items(), rows, strict=True):
            _draw_rewards(rewards, search)
            _draw_widths(widths, search)
            rewards.set_title(f"{name}: reward, {len(search['episodes'])} episodes", loc="left")
            widths.set_title(f"{name}: widths, {search['verified_ratio']:.2f} of the original's cost", loc="left")
    return figure


def _draw_rewards(ax: Axes, search: dict[str, Any]) -> None:
    rewards = [episode["reward"] for episode in search["episodes"]]
    best = [max(rewards[: index + 1]) for index in range(len(rewards))]
    for source, (colour, label) in _SOURCES.items():
        mine = [index for index, episode in enumerate(search["episodes"]) if episode["source"] == source]
        if mine:
            ax.scatter(mine, [rewards[index] for index in mine], s=12, color=colour, label=label, linewidths=0)
    ax.step(range(len(best)), best, where="post", color="#000000", linewidth=1, label="best so far")
    ax.set_xlabel("episode")
    ax.set_ylabel("reward")
    ax.legend(loc="lower right", fontsize=8)


def _draw_widths(ax: Axes, search: dict[str, Any]) -> None:
    places = range(len(search["widths"]))
    ax.bar(places, [layer["whole"] for layer in search["widths"]], color="#e4e4e4", label="before")
    ax.bar(places, [layer["kept"] for layer in search["widths"]], color=COLOURS[0], label="kept")
    ax.set_xticks(list(places), [layer["group"] for layer in search["widths"]], rotation=90, fontsize=6)
    ax.set_ylabel("channels")
    ax.legend(loc="upper left", fontsize=8)
