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


@dataclass(frozen=True)
class Config:
    """Methods seed by seed."""

    results: Annotated[Path, tyro.conf.Positional]
    """results.csv of `python -m rmprune report`."""
    than: str = "residual"
    """The method over which leads are given."""


def spread(values: "pd.Series[float]", digits: int) -> str:
    """Mean and, of more than one value, standard deviation."""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


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
    keys = ["backend", "threads", "batch_size"]
    dense = data[data.method == "dense"].groupby("seed")[["macs", "accuracy", "auc"]].first()
    rows = []
    for (budget, method), part in data.groupby(["budget", "method"]):
        one = part.groupby("seed")[["accuracy", "auc", "macs"]].first()
        rivals = data[(data.budget == budget) & (data.method == than)].groupby("seed").accuracy.first()
        times = part.groupby(keys).ratio.mean()
        rows.append(
            {
                "budget": budget or "dense",
                "method": "" if method == "dense" else f"`{method}`",
                "seeds": " ".join(map(str, one.index)),
                "accuracy by seed, %": " / ".join(f"{100 * value:.1f}" for value in one.accuracy),
                "accuracy, %": spread(100 * one.accuracy, 1),
                f"ahead of `{than}`, points": "" if method in (than, "dense") else lead(one.accuracy, rivals),
                "AUC": spread(one.auc, 3) if one.auc.notna().all() else "",
                "MACs": f"{(one.macs / dense.macs).mean():.2f}x",
                "time, batch " + " / ".join(str(batch) for *_, batch in times.index): " / ".join(f"{ratio:.3f}" for ratio in times),
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    size = table.budget.str.extract(r"([\d.]+)$")[0].astype(float).fillna(math.inf)
    best = table["accuracy, %"].str.split().str[0].astype(float)
    return (
        table.assign(size=size, best=best).sort_values(["size", "best"], ascending=False).drop(columns=["size", "best"])
    )


def main(config: Config) -> None:
    data = pd.read_csv(config.results)
    several = [name for name in ("model", "dataset") if data[name].nunique() > 1]
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
