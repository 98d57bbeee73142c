"""How right are networks of solar cells where the experts were sure, and where they were not?

    python experiments/solar-cells/by_certainty.py runs/dense-0 runs/dense-1 runs/dense-2 runs/dense-3 runs/dense-4

The experts gave each cell a probability of a defect: 0, 1/3, 2/3 or 1; layout.py makes two classes of them at a half. Takes finished runs
of `train` on its splits and writes a row for each network: its accuracy on the test cells, on those of which the experts were sure (0 and
1), and on those of each probability.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from rmprune.artifact import files as artifact
from rmprune.config import DataConfig
from rmprune.config.toml import from_dict
from rmprune.data.folder import FolderSplit
from rmprune.data.load import load_dataset
from rmprune.training.evaluation import logits_of


@dataclass(frozen=True)
class Settings:
    """Runs, and where the table goes."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path = Path("reports/solar-cells/by-certainty.csv")


def answers(run: Path) -> pd.DataFrame:
    """One row for each test cell: its probability of a defect, and whether the network was right."""
    record = json.loads((run / "record.json").read_text())
    config = from_dict(DataConfig, record["config"]["data"])
    test = load_dataset(config).test
    assert isinstance(test, FolderSplit) and config.data_dir is not None and config.labels is not None
    with (config.data_dir / config.labels).open(newline="") as file:
        probability = {Path(row["image"]).name: float(row["probability"]) for row in csv.DictReader(file)}
    logits, labels = logits_of(artifact.load(run / "dense").eval(), test)
    cells = [Path(test.photos.paths[number]).name for number in test.indices.tolist()]
    return pd.DataFrame({"probability": [probability[cell] for cell in cells], "right": logits.argmax(1) == labels})


def row(run: Path) -> dict[str, object]:
    """Accuracies of one run."""
    found = answers(run)
    sure = found.probability.isin((0.0, 1.0))
    by_level = found.groupby(found.probability.round(2)).right.agg(["mean", "size"])
    levels = {f"accuracy at {level}": mean for level, mean in by_level["mean"].items()}
    sizes = {f"cells at {level}": size for level, size in by_level["size"].items()}
    whole = {"accuracy": found.right.mean(), "accuracy, sure cells": found.right[sure].mean()}
    return {"run": run.name} | whole | levels | sizes


def main(settings: Settings) -> None:
    table = pd.DataFrame([row(run) for run in settings.runs])
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(settings.out, index=False)
    print(table.round(3).to_string(index=False))
    print("mean  ", table.mean(numeric_only=True).round(3).to_dict())
    print("spread", table.std(numeric_only=True).round(3).to_dict())
    print(settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
