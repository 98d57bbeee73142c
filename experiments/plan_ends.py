r"""Does what `slim --method auto` chooses by say what fine-tuning makes of a network? Losses before, on the way, and at the end.

    python -m rmprune slim --model resnet20 --width 16 --dataset fashion-mnist --train-images 20000 --batch-size 128 --epochs 6 \
        --method residual --macs-ratio 0.2 --out runs/w16
    python experiments/plan_ends.py runs/w16/dense      # writes reports/plan-ends; an hour on one slow core

All that one search tries (the presets' networks, the plans of its surrogate) is cut to one budget in MACs, fitted and fine-tuned to its end
by one recipe; apart from that each is trained on a few images, at a rate that falls to 0, as if that were all. The rank correlations with
the test loss at the end say by which loss on validation images to choose. Goes on from what is there.
"""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from rich.console import Console
from torch import nn

from rmprune.artifact import files as artifact
from rmprune.config import DataConfig, PruneConfig, SlimConfig, TrainConfig
from rmprune.data.load import load_dataset
from rmprune.measure import count_macs
from rmprune.methods import auto
from rmprune.methods.cutter import Cutter, make_cutter
from rmprune.methods.slim import met
from rmprune.pipelines.slim import starts_of
from rmprune.pipelines.stages import with_names
from rmprune.pruning import Budget
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.runs.cells import Cell
from rmprune.runs.notes import read_notes
from rmprune.runs.records import training_log
from rmprune.runs.writing import write_text
from rmprune.training import evaluate
from rmprune.training.job import Files, Job, tune

console = Console()


@dataclass(frozen=True)
class Arguments:
    """Which network, and how long each is trained."""

    dense: tyro.conf.Positional[Path]
    """Artifact of the trained network."""
    model: str = "resnet20"
    width: int = 16
    dataset: str = "fashion-mnist"
    train_images: int = 20_000
    """A fixed part of the training images."""
    batch_size: int = DataConfig().batch_size
    macs_ratio: float = 0.08
    """The budget of every plan."""
    round_to: int = 4
    epochs: int = 3
    """Of fine-tuning."""
    images: tuple[int, ...] = (1250, 5000)
    """Of each short training."""
    minutes: float = 3.0
    """For plans that differ in one block from the best."""
    seed: int = 0
    backwards: bool = False
    """The last candidate first: for a second process beside the first."""
    out: Path = Path("reports/plan-ends")
    """Where the table goes."""
    work: Path = Path("runs/plan-ends")
    """Where the search and the trainings are."""


@dataclass(frozen=True)
class Candidate:
    """One that the search tried: how it is cut, its loss on validation images then, what became of the blocks."""

    name: str
    cut: Callable[[], nn.Module]
    before: float
    blocks: str


def job_of(arguments: Arguments) -> Job[SlimConfig]:
    """What all cuts and trainings take: settings, images, the trained network as teacher."""
    prune = PruneConfig(macs_ratio=(arguments.macs_ratio,), round_to=arguments.round_to)
    tuning = TrainConfig(epochs=arguments.epochs, learning_rate=0.06, warmup_epochs=1.0, distillation=0.5)
    images = DataConfig(dataset=arguments.dataset, train_images=arguments.train_images, batch_size=arguments.batch_size)
    config = SlimConfig(
        model=arguments.model, width=arguments.width, prune=prune, finetune=tuning, data=images, out=arguments.work,
        search_minutes=arguments.minutes,
    )  # fmt: skip
    arguments.work.mkdir(parents=True, exist_ok=True)
    dense, memory = artifact.load(arguments.dense).eval(), arguments.work / "teacher"
    return Job(config, load_dataset(images), torch.device("cpu"), arguments.seed, teacher=dense, memory=memory)


def candidates(arguments: Arguments, job: Job[SlimConfig]) -> list[Candidate]:
    """Searched now, or taken from the notes of the search."""
    cell = Cell(arguments.seed, "macs_ratio", arguments.macs_ratio, arguments.work, arguments.work)
    starts, dense, files = starts_of(job, cell), with_names(job.original, job), Files.of(arguments.work, "auto")
    reference = count_macs(dense, job.data.train.example(1))
    budget = Budget.from_config(job.config.prune, "macs_ratio", arguments.macs_ratio, reference_macs=reference)
    found = auto.choose_plan(dense, starts, budget, job, files)

    def cutter(name: str) -> Cutter:
        if name in found.plans:
            plain, _ = carry_out_blocks(dense, found.plans[name]["blocks"], job.examples)
            return make_cutter(plain, auto.FREE, job, budget, found.plans[name]["widths"])
        preset = auto.preset_of(name)
        return make_cutter(starts(preset.start), preset, job, budget)

    def cut(name: str) -> nn.Module:
        own = cutter(name)
        return own.once(own.network, met(budget, own, files.named(name)))

    blocks = {name: " ".join(plan["blocks"].values()) for name, plan in found.plans.items()}
    losses = {name: verdict["loss"] for name, verdict in found.verdicts.items() if "loss" in verdict}
    return [Candidate(name, functools.partial(cut, name), loss, blocks.get(name, "")) for name, loss in losses.items()]


def measured(one: Candidate, arguments: Arguments, job: Job[SlimConfig]) -> dict[str, Any]:
    """All losses of a candidate: after each short training, after each epoch of the whole one, on the test images at its end."""
    data, tuning, network = job.data, job.config.finetune, one.cut()
    row: dict[str, Any] = {"candidate": one.name, "blocks": one.blocks, "before": one.before}
    short = dataclasses.replace(tuning, epochs=1, warmup_epochs=0.1)
    for images in arguments.images:
        config = dataclasses.replace(data.config, train_images=images)
        part = dataclasses.replace(job, data=load_dataset(config))
        tried = tune(network, short, part, Files.of(arguments.work / f"part-{images}", one.name))
        row[f"after {images} images"] = evaluate(tried, data.validation, device=job.device).loss
    files = Files.of(arguments.work / "end", one.name)
    end = evaluate(tune(network, tuning, job, files), data.test, device=job.device)
    for epoch in training_log(files.log.parent)[one.name]:
        row[f"after epoch {epoch['epoch']}"] = epoch["validation_loss"]
    return row | {"test loss": end.loss, "test accuracy": end.accuracy}


def main(arguments: Arguments) -> None:
    """Search, train, compare."""
    job = job_of(arguments)
    rows, every = [], candidates(arguments, job)
    for one in reversed(every) if arguments.backwards else every:
        note = arguments.work / f"{one.name}.json"
        if not (row := read_notes(note)):
            row = measured(one, arguments, job)
            write_text(note, pd.Series(row).to_json())
        rows.append(row)
        console.print(", ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float)))
    table = pd.DataFrame(rows).sort_values("test loss")
    lines = report(table)
    write_text(arguments.out / "plans.csv", table.round(5).to_csv(index=False))
    command = shlex.join(["python", "experiments/plan_ends.py", *sys.argv[1:]])
    said = (
        f"{arguments.model}, width {arguments.width}, {arguments.train_images} images of {arguments.dataset}, "
        f"{arguments.macs_ratio:g} of its MACs, all {len(table)} candidates of one search, each fine-tuned for {arguments.epochs} epochs"
    )
    page = f"# From what the end of a plan can be told\n\n`{command}`: {said} ([CSV](plans.csv)).\n\n"
    write_text(arguments.out / "table.md", page + "\n".join(lines) + "\n")
    console.print("\n".join(lines))


def report(table: pd.DataFrame) -> list[str]:
    """A row for each loss on validation images: its rank correlations with the end, and what choosing by it would have got."""
    best = table["test accuracy"].max()
    lines = [
        "| loss on validation images | rank correlation with the test loss at the end | test accuracy of the least | of the best |"
    ]
    lines.append("| --- | ---: | ---: | ---: |")
    ranks = table.corr("spearman", numeric_only=True)["test loss"]
    for column in [name for name in table.columns if name == "before" or name.startswith("after ")]:
        got = table.loc[table[column].idxmin(), "test accuracy"]
        lines.append(f"| {column} | {ranks[column]:.2f} | {got:.2%} | {best:.2%} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
