"""How much faster a method is than the best of its rivals (coupled pruning) *at equal accuracy*, from the results of `slim` runs.

    python experiments/equal_accuracy.py reports/slim-fashion/results.csv
    python experiments/equal_accuracy.py reports/slim-fashion/results.csv --seed 0
    python experiments/equal_accuracy.py reports/slim-fashion/results.csv reports/slim-fashion-round-16/results.csv --seed 0

For each backend and batch size the rivals and the dense network give a front: the best accuracy (mean over seeds) that one of them
reaches within a time. Between its points accuracy is linear in log time. A network of another method with accuracy a
and time t is (time at which the front reaches a) / t times as fast. Like is compared with like: a row and its front are means over
the same seeds, those that the method has at that budget and the rivals at all budgets. Fronts of few points and one or two seeds
are no proof: the table shows the points too. Writes a table beside the first CSV.
"""

import itertools
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from rmprune.report.tables import CONFIGURATION, relative

COUPLED = ("coupled", "coupled-taylor", "coupled-norm")


@dataclass(frozen=True)
class Config:
    """Speed at equal accuracy over the front of the rivals."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """results.csv of `python -m rmprune report`; of a second and further ones, pruned networks are points of their own, not seeds."""
    seed: int | None = None
    """This seed alone, instead of means over seeds."""
    rivals: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = COUPLED
    """Methods whose front is compared with."""


def front(points: pd.DataFrame) -> list[tuple[float, float]]:
    """[(log time ratio, accuracy)] of the points that no faster one matches, by rising time."""
    found: list[tuple[float, float]] = []
    points = points.dropna(subset=["ratio", "accuracy"])
    for ratio, accuracy in sorted(zip(points.ratio, points.accuracy, strict=True)):
        if not found or accuracy > found[-1][1]:
            found.append((math.log(ratio), accuracy))
    return found


def speed_at(accuracy: float, ratio: float, points: list[tuple[float, float]]) -> str:
    """How many times as fast a network is as the front where that has its accuracy; beyond the front's ends, which end; nothing where
    there is no front."""
    if not points:
        return ""
    for (t0, a0), (t1, a1) in itertools.pairwise([points[0], *points]):
        if a0 <= accuracy <= a1:
            share = (accuracy - a0) / (a1 - a0) if a1 > a0 else 0.0
            return f"{math.exp(t0 + (t1 - t0) * share) / ratio:.2f}x"
    return "more accurate than all of it" if accuracy > points[-1][1] else "less accurate than all of it"


def compare(data: pd.DataFrame, rivals: tuple[str, ...] = COUPLED) -> pd.DataFrame:
    """One row for each method, budget and place, means over the seeds that the rivals have at all their budgets too.

    `realised`: the speed-up over the reduction in MACs.
    """
    pruned = data[~data.method.isin(["plain", "dense"])]
    seeds_of = pruned.groupby(["model", "method", "budget"]).seed.agg(frozenset)
    rows = []
    for (model, method, budget), own in seeds_of.items():
        seeds = sorted(own & front_seeds(seeds_of, model, rivals))
        same = relative(data[(data.model == model) & data.seed.isin(seeds)])
        same = same[same.seeds == len(seeds)]
        for (backend, _, threads, batch), part in same.groupby(CONFIGURATION):
            best = front(part[part.method.isin([*rivals, "dense"])])
            for row in part[(part.method == method) & (part.budget == budget)].itertuples():
                faster = "" if method in rivals else speed_at(row.accuracy, row.ratio, best)
                accuracy = f"{row.accuracy:.2%}" + (f" ± {row.accuracy_spread * 100:.2f}" if row.seeds > 1 else "")
                facts = (method, budget, " ".join(map(str, seeds)), accuracy)
                figures = (f"{row.macs_ratio:.3f}", f"{row.ratio:.3f}", f"{row.macs_ratio / row.ratio:.2f}")
                rows.append((model, backend, threads, batch, *facts, *figures, faster))
    facts = ["method", "budget", "seeds", "accuracy", "MACs", "time", "realised", "speed at equal accuracy"]
    if not rows:
        raise SystemExit(
            f"no seed with which {', '.join(rivals)} ran at all budgets: there is no front to compare with"
        )
    table = pd.DataFrame(rows, columns=["model", "backend", "threads", "batch", *facts])
    return table.sort_values(["model", "backend", "threads", "batch"], kind="stable")


def front_seeds(seeds_of: "pd.Series[frozenset[int]]", model: str, rivals: tuple[str, ...]) -> frozenset[int]:
    """The seeds with which the front has all its budgets: at each, those of the rival that has most."""
    found: dict[str, frozenset[int]] = {}
    for (name, method, budget), seeds in seeds_of.items():
        if name == model and method in rivals:
            found[budget] = max(found.get(budget, frozenset()), seeds, key=len)
    return frozenset.intersection(*found.values()) if found else frozenset()


def read(config: Config) -> pd.DataFrame:
    """The rows of all files; budgets of further files are named by their directory."""
    first, *others = [pd.read_csv(path) for path in config.results]
    named = [
        data.assign(budget=data.budget + f" ({path.parent.name})")
        for path, data in zip(config.results[1:], others, strict=True)
    ]
    data = pd.concat([first, *named])
    if config.seed is not None:
        data = data[data.seed == config.seed]
    if data.dataset.nunique() > 1:
        raise SystemExit(f"rows of several data sets ({', '.join(sorted(set(data.dataset)))}); report one at a time")
    if data.empty:
        raise SystemExit(
            f"{', '.join(map(str, config.results))}: no row{'' if config.seed is None else f' of seed {config.seed}'}"
        )
    return data


def main(config: Config) -> None:
    table = compare(read(config), config.rivals)
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    parts = ["equal-accuracy", *(path.parent.name for path in config.results[1:])]
    out = config.results[0].with_name(
        "-".join(parts + ([] if config.seed is None else [f"seed-{config.seed}"])) + ".md"
    )
    out.write_text(
        "MACs and time are relative to the dense network (realised: their quotient), ± is the standard deviation over seeds, "
        f"speed is over the front of {', '.join(config.rivals)} and dense with the same seeds. `python {shlex.join(sys.argv)}`\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(table.to_string(index=False))
    print(out)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
