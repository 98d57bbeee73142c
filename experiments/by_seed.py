"""What each method keeps at each budget, seed by seed (or split by split), from the results of `slim` runs, and how far one is ahead.

    python experiments/by_seed.py reports/solar-cells/results.csv
    python experiments/by_seed.py reports/solar-cells/results.csv --than residual

Accuracy and AUC: mean ± standard deviation over seeds. The lead over `--than` is paired: its mean ± standard error over the seeds that
both have, and the number of seeds on which a method is ahead. Time and MACs are means, relative to the dense network of the same seed.
Nothing is averaged over different budgets. Writes a table beside the CSV.
"""

import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from rmprune.report.tables import relative


@dataclass(frozen=True)
class Config:
    """Methods seed by seed."""

    results: Annotated[Path, tyro.conf.Positional]
    """results.csv of `python -m rmprune report`."""
    than: str = "residual"
    """The method over which leads are given."""


def spread(values: "pd.Series[float]", digits: int) -> str:
    """Mean and, of several seeds, standard deviation; nothing where there is no value."""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return "" if values.isna().all() else f"{values.mean():.{digits}f}{deviation}"


def lead(own: "pd.Series[float]", other: "pd.Series[float]") -> str:
    """Mean difference in points ± its standard error, and on how many of the common seeds it is positive."""
    difference = 100 * (own - other).dropna()
    if difference.empty:
        return ""
    error = f" ± {difference.std() / math.sqrt(len(difference)):.1f}" if len(difference) > 1 else ""
    return f"{difference.mean():+.1f}{error} ({(difference > 0).sum()} of {len(difference)})"


def by_seed(data: pd.DataFrame, than: str) -> pd.DataFrame:
    """One row for each budget and method; `data`: rows of `report`, one for each network and place of measurement."""
    data = data[data.method != "plain"].assign(budget=data.budget.fillna(""))
    networks = data.groupby(["budget", "method", "seed"])[
        ["accuracy", "auc"]
    ].first()  # one of each, at whatever batch size
    accuracy = networks.accuracy
    rows = []
    for (budget, method), places in relative(data).groupby(["budget", "method"]):
        own = accuracy[budget, method]
        rival = accuracy[budget, than] if (budget, than) in accuracy else own.iloc[:0]
        batches = "time, batch " + " / ".join(map(str, places.batch_size))
        rows.append(
            {
                "budget": budget or "dense",
                "method": "" if method == "dense" else f"`{method}`",
                "seeds": " ".join(map(str, own.index)),
                "accuracy by seed, %": " / ".join(f"{100 * value:.1f}" for value in own),
                "accuracy, %": spread(100 * own, 1),
                f"ahead of `{than}`, points": "" if method in (than, "dense") else lead(own, rival),
                "AUC": spread(networks.auc[budget, method], 3),
                "MACs": f"{places.macs_ratio.iloc[0]:.2f}x",
                batches: " / ".join(f"{ratio:.3f}" for ratio in places.ratio),
                "order": (float(budget.rpartition(" ")[2]) if budget else math.inf, own.mean()),
            }
        )
    return pd.DataFrame(sorted(rows, key=lambda row: row["order"], reverse=True)).drop(columns="order")


def main(config: Config) -> None:
    data = pd.read_csv(config.results)
    several = [name for name in ("model", "dataset", "backend", "device", "threads") if data[name].nunique() > 1]
    if several:
        raise SystemExit(f"{config.results}: several values of {', '.join(several)}; report one at a time")
    if config.than not in set(data.method):
        raise SystemExit(f"{config.results}: no row of {config.than}; it has {', '.join(sorted(set(data.method)))}")
    table = by_seed(data, config.than)
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    out = config.results.with_name("by-seed.md")
    out.write_text(f"`python {shlex.join(sys.argv)}`\n\n" + "\n".join(lines) + "\n")
    print(table.to_string(index=False))
    print(out)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
