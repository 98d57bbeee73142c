"""What each part of pruning and recovery is worth, one changed at a time: two tables from one trained network.

    python experiments/ablation.py runs/slim-fashion/seed0/dense      # writes reports/ablation-fashion

importance: `rm` (a plain net whose reserved copies and computed channels compete) in one cut, by every importance there is, and with
its reserved copies held while it is fine-tuned (their batch norms are trained).
recovery: `rm-collapse` as `slim` does it, and with one setting changed.

All get the same budget in MACs, images and epochs. Judged on the validation images, which nothing is trained on; the test images are
never read. Goes on where it was interrupted.
"""

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from rmprune.artifact import files as artifact
from rmprune.config import DataConfig, PruneConfig, SlimConfig, TrainConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.errors import ConfigError
from rmprune.measure import count_macs
from rmprune.methods.cutter import Cutter, make_cutter
from rmprune.methods.slim import slim_network
from rmprune.methods.start import start
from rmprune.methods.table import METHODS
from rmprune.pruning import Budget, allocate
from rmprune.pruning.refit import fitting_images, refit
from rmprune.training import evaluate
from rmprune.training.job import Files, Job, tune
from rmprune.training.state import TrainState

console = Console()


@dataclass(frozen=True)
class Settings:
    """The ablation study."""

    dense: tyro.conf.Positional[Path]
    """Artifact of the trained network with its residuals (`slim` writes it: RUN/seed0/dense)."""
    dataset: str = "fashion-mnist"
    """What it was trained on."""
    train_images: int = 12_000
    """A fixed part of the training images."""
    macs_ratio: float = 0.15
    """Budget of every row."""
    epochs: int = 3
    """Epochs of fine-tuning of every row."""
    seed: int = 0
    """Of the order of the images."""
    runs: Path = Path("runs/ablation-fashion")
    """Where checkpoints and the log go."""
    out: Path = Path("reports/ablation-fashion")
    """Where the tables go."""

    @property
    def shown(self) -> dict[str, Any]:
        """What all rows of a table share."""
        names = ("dataset", "train_images", "budget", "epochs", "seed")
        values = (self.dataset, self.train_images, self.macs_ratio, self.epochs, self.seed)
        return dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class Row:
    """One training. `prune`, `finetune`: what differs from `slim`'s settings; `recalibrated`: batch norms are measured after one cut;
    `held`: the part of the steps for which reserved copies stay identities.
    """

    table: str
    name: str
    method: str
    prune: dict[str, Any] = dataclasses.field(default_factory=dict)
    finetune: dict[str, Any] = dataclasses.field(default_factory=dict)
    recalibrated: bool = False
    held: float = 0.0


ONCE: dict[str, Any] = {"reconstruct": False}
GRADUAL: dict[str, Any] = {"gradual": True}
ROWS = [
    *(
        Row("importance", name, "rm", ONCE | {"importance": name})
        for name in ("batch_norm", "magnitude", "activation", "taylor", "taylor_squared", "random")
    ),
    Row(
        "importance",
        "batch_norm, one global threshold",
        "rm",
        ONCE | {"importance": "batch_norm", "rank": "importance"},
    ),
    Row("importance", "taylor, one global threshold", "rm", ONCE | {"importance": "taylor", "rank": "importance"}),
    Row("importance", "taylor, layers reconstructed", "rm"),
    Row("importance", "taylor, cut while training", "rm", GRADUAL),
    Row("importance", "taylor, identity rows fixed", "rm", ONCE, held=1.0),
    Row("importance", "taylor, identity rows fixed for half of the steps", "rm", ONCE, held=0.5),
    Row("recovery", "as slim does it (one cut, layers reconstructed)", "rm-collapse"),
    Row("recovery", "as slim does it, distillation alone", "rm-collapse", finetune={"distillation": 1.0}),
    Row("recovery", "as slim does it, half of the learning rate", "rm-collapse", finetune={"learning_rate": 0.03}),
    Row("recovery", "as slim does it, a sixth of the learning rate", "rm-collapse", finetune={"learning_rate": 0.01}),
    Row("recovery", "as slim does it, twice the learning rate", "rm-collapse", finetune={"learning_rate": 0.12}),
    Row("recovery", "one cut", "rm-collapse", ONCE),
    Row("recovery", "one cut, batch norms recalibrated", "rm-collapse", ONCE, recalibrated=True),
    *(
        Row("recovery", f"cut while training{name}", "rm-collapse", GRADUAL | prune, finetune)
        for name, prune, finetune in (
            ("", {}, {}),
            (", no distillation", {}, {"distillation": 0.0}),
            (", distillation alone", {}, {"distillation": 1.0}),
            (", a third of the learning rate", {}, {"learning_rate": 0.02}),
            (", twice the learning rate", {}, {"learning_rate": 0.12}),
            (", over a quarter of it", {"cut_fraction": 0.25}, {}),
            (", over three quarters of it", {"cut_fraction": 0.75}, {}),
            (", two cuts", {"cuts": 2}, {}),
            (", no memory of scores", {"score_decay": 0.0}, {}),
        )
    ),
]


def run(row: Row, dense: nn.Module, data: Dataset, settings: Settings) -> dict[str, Any]:
    """Prune, fine-tune, and validate."""
    usual = {"learning_rate": 0.06, "warmup_epochs": 1.0, "distillation": 0.5}
    tuning = TrainConfig(epochs=settings.epochs, **(usual | row.finetune))
    method = METHODS[row.method]
    network = start(dense, method.start, data.train.example)[0]
    config = SlimConfig(
        method=(row.method,),
        data=data.config,
        prune=PruneConfig(macs_ratio=(settings.macs_ratio,), **row.prune),
        finetune=tuning,
    )
    example = data.train.example(1)
    whole = count_macs(dense, example)
    budget = Budget.from_config(config.prune, "macs_ratio", settings.macs_ratio, reference_macs=whole)
    job = Job(config, data, torch.device("cpu"), settings.seed, teacher=dense)
    files = Files(settings.runs / f"{row.table}-{row.name}.pt", settings.runs / "log.jsonl", row.name)
    cut = None
    if dataclasses.replace(config.prune, **method.settings).gradual:
        model = slim_network(network, method, budget, job, files)[0]
    else:
        cutter = make_cutter(network, method, job)
        smaller = cut_once(cutter, cutter.floored(budget), row.recalibrated)
        cut = evaluate(smaller, data.validation).accuracy
        model = tune(smaller, tuning, job, files, IdentityRows(smaller, row.held) if row.held else None)
    return {
        "table": row.table,
        "row": row.name,
        "method": row.method,
        "validation_before": cut,
        "validation": evaluate(model, data.validation).accuracy,
        "macs_ratio": count_macs(model, example) / whole,
        **settings.shown,
    }


def cut_once(cutter: Cutter, budget: Budget, recalibrated: bool) -> nn.Module:
    """The network after one cut, as `slim` leaves it or with its batch norms measured anew."""
    if not recalibrated:
        return cutter.once(cutter.network, budget)
    keep = allocate(cutter.structure, cutter.scores, budget, rank=cutter.settings.rank)
    return refit(
        cutter.network, cutter.structure, keep, fitting_images(cutter.job.batches, cutter.network), reconstruct=False
    )


class IdentityRows:
    """Holds the rows of convolutions that only copy a channel, for this part of the steps (a training hook)."""

    def __init__(self, model: nn.Module, part: float) -> None:
        self.part = part
        self.rows: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight.detach()
                copies = (weight != 0).flatten(1).sum(dim=1) == 1
                self.rows[name] = copies, weight[copies].clone()

    def __call__(self, state: TrainState) -> None:
        if state.step <= self.part * state.total_steps:
            with torch.no_grad():
                for name, (copies, weight) in self.rows.items():
                    state.model.get_submodule(name).weight[copies] = weight


def done_rows(path: Path, settings: Settings) -> list[dict[str, Any]]:
    """The rows of the table as it lies there. Refuses one that was made with other settings."""
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    if any(row.get(name) != value for row in rows for name, value in settings.shown.items()):
        raise ConfigError(f"{path} was made with other settings; give another --out and --runs")
    return rows


def markdown(table: pd.DataFrame, settings: Settings, images: int) -> str:
    """Both tables for a reader."""
    text = [
        f"# Ablations: {settings.macs_ratio:g} of the MACs, {settings.epochs} epochs of {settings.train_images:,} images",
        f"Accuracy on {images:,} validation images; one seed, so small differences are noise.",
    ]
    for name, rows in table.groupby("table", sort=False):
        text += [
            f"## {name.capitalize()} (`{rows.method.iloc[0]}`)",
            "| | after the cut | fine-tuned | MACs |\n| --- | ---: | ---: | ---: |",
        ]
        best = rows.sort_values("validation", ascending=False)
        text[-1] += "".join(
            f"\n| {r.row} | {'' if pd.isna(r.validation_before) else f'{100 * r.validation_before:.1f} %'} "
            f"| {100 * r.validation:.2f} % | {r.macs_ratio:.3f}x |"
            for r in best.itertuples()
        )
    return "\n\n".join(text) + "\n"


def main(settings: Settings) -> None:
    dense = artifact.load(settings.dense)
    data = load_dataset(DataConfig(settings.dataset, batch_size=128, train_images=settings.train_images))
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "results.csv"
    rows = done_rows(path, settings)
    for number, row in enumerate(ROWS, 1):
        if any(done["table"] == row.table and done["row"] == row.name for done in rows):
            continue
        console.print(f"[{number}/{len(ROWS)}] {row.table}: {row.name}")
        rows.append(run(row, dense, data, settings))
        console.print(f"  {rows[-1]['validation']:.2%} at {rows[-1]['macs_ratio']:.3f} of the MACs")
        pd.DataFrame(rows).to_csv(path, index=False)
    (settings.out / "ablation.md").write_text(markdown(pd.DataFrame(rows), settings, len(data.validation)))
    (settings.out / "command.txt").write_text("python " + shlex.join(sys.argv) + "\n")
    console.print(f"{settings.out}/ablation.md written")


if __name__ == "__main__":
    main(tyro.cli(Settings))
