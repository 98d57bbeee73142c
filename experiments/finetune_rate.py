r"""At which rate, and how close to the teacher, is a cut network best fine-tuned in a few epochs?

    python experiments/plan_ends.py runs/w16/dense      # makes the candidates; its head says how the network is trained
    python experiments/finetune_rate.py runs/w16/dense  # writes reports/finetune-rate; twenty minutes on one slow core

Candidates of one search (see plan_ends.py) are cut and fitted once and then fine-tuned by recipes that differ in one thing each: peak rate,
warm-up, weight of the teacher. Goes on from what is there.
"""

import dataclasses
import itertools
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plan_ends
import tyro
from rich.console import Console
from torch import nn

from rmprune.artifact import files as artifact
from rmprune.config import SlimConfig
from rmprune.runs.notes import read_notes
from rmprune.runs.writing import write_text
from rmprune.training import evaluate, fit
from rmprune.training.job import Job

console = Console()
RECIPES = {
    "rate 0.06": {},
    "rate 0.02": {"learning_rate": 0.02},
    "rate 0.12": {"learning_rate": 0.12},
    "rate 0.24": {"learning_rate": 0.24},
    "rate 0.12, warm-up of 0.3 epochs": {"learning_rate": 0.12, "warmup_epochs": 0.3},
    "rate 0.12, teacher 0.9": {"learning_rate": 0.12, "distillation": 0.9},
    "rate 0.12, no teacher": {"learning_rate": 0.12, "distillation": 0.0},
}
"""How each differs from the first: three epochs, a warm-up of one, cosine to 0, half of the loss the teacher's."""


@dataclass(frozen=True)
class Arguments(plan_ends.Arguments):
    """Which networks, by which recipes."""

    candidates: tuple[str, ...] = ("plan-1", "rm-collapse", "uniform")
    seeds: tuple[int, ...] = (0, 1)
    """Of the order of images and their augmentation."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    batch_size: int = 128
    """As in auto-fashion.toml."""
    out: Path = Path("reports/finetune-rate")


def measured(name: str, recipe: str, seed: int, network: nn.Module, job: Job[SlimConfig]) -> dict[str, Any]:
    """What a cut network becomes by one recipe, on validation and test images."""
    row: dict[str, Any] = {"candidate": name, "recipe": recipe, "seed": seed}
    row["before"] = evaluate(network, job.data.test).accuracy
    config = dataclasses.replace(job.config.finetune, **RECIPES[recipe])
    teacher = job.teacher if config.distillation else None
    end = fit(
        network, job.data, config, seed=seed, teacher=teacher, teacher_memory=job.memory, progress=False, label=name
    )
    for part in ("validation", "test"):
        found = evaluate(end, getattr(job.data, part))
        row |= {f"{part} loss": found.loss, f"{part} accuracy": found.accuracy}
    return row


def main(arguments: Arguments) -> None:
    """Cut, fine-tune, compare."""
    job = plan_ends.job_of(arguments)
    every = {one.name: one for one in plan_ends.candidates(arguments, job)}
    rows = []
    for seed, name in itertools.product(arguments.seeds, arguments.candidates):
        if not (cut := arguments.work / "cut" / name).exists():
            artifact.save(every[name].cut(), cut)
        for recipe in arguments.recipes:
            note = arguments.work / "rates" / f"{name}, {recipe}, seed {seed}.json"
            if not (row := read_notes(note)):
                row = measured(name, recipe, seed, artifact.load(cut), job)
                note.parent.mkdir(parents=True, exist_ok=True)
                write_text(note, pd.Series(row).to_json())
            console.print(
                f"{name}, {recipe}, seed {seed}: {row['validation accuracy']:.2%}, {row['test accuracy']:.2%}"
            )
            rows.append(row)
    table = pd.DataFrame(rows)
    write_text(arguments.out / "rates.csv", table.round(5).to_csv(index=False))
    both = ["validation accuracy", "test accuracy"]
    by = table.pivot_table(index="recipe", columns="candidate", values=both, sort=False) * 100
    command = shlex.join(["python", "experiments/finetune_rate.py", *sys.argv[1:]])
    said = (
        f"{arguments.model}, width {arguments.width}, {arguments.train_images} images of {arguments.dataset}, {arguments.macs_ratio:g} of "
        f"its MACs, {arguments.epochs} epochs, batches of {arguments.batch_size}; accuracy in %, mean of {len(arguments.seeds)} seeds"
    )
    head = (
        "| recipe | "
        + " | ".join(f"{name}, {part.split()[0]}" for part, name in by.columns)
        + " |\n| --- |"
        + " ---: |" * len(by.columns)
    )
    lines = [f"| {recipe} | " + " | ".join(f"{value:.2f}" for value in row) + " |" for recipe, row in by.iterrows()]
    page = f"# Rates of fine-tuning\n\n`{command}`: {said} ([CSV](rates.csv)).\n\n" + "\n".join([head, *lines]) + "\n"
    write_text(arguments.out / "table.md", page)
    console.print(page)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
