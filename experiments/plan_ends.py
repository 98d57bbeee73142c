"""Does what `slim --method auto` judges plans by say what fine-tuning makes of them? Losses before, after a short training, and at the end.

    python experiments/plan_ends.py runs/w16/seed0/dense      # writes reports/plan-ends

All that one search tries (the presets' networks, the plans of its surrogate) is cut to one budget in MACs, fitted, and fine-tuned to its
end; apart from that each is trained on so many images, at a rate that falls to 0, as if that were all. The rank correlations with the end
say which of the losses on validation images is worth choosing by; the noise of the end itself is what two seeds of its order of images leave.
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
from rmprune.data.splits import Part
from rmprune.measure import count_macs
from rmprune.methods import auto
from rmprune.methods.cutter import make_cutter
from rmprune.methods.slim import met
from rmprune.pipelines.slim import starts_of
from rmprune.pipelines.stages import with_names
from rmprune.pruning import Budget
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.runs.cells import Cell
from rmprune.runs.notes import read_notes
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
    macs_ratio: float = 0.08
    """The budget of every plan."""
    round_to: int = 4
    epochs: int = 3
    """Of fine-tuning to the end."""
    images: tuple[int, ...] = (1250, 2500, 5000, 10_000, 20_000)
    """Of each short training."""
    seeds: int = 2
    """Orders of the images at the end."""
    minutes: float = 3.0
    """For plans that differ in one block from the best."""
    backwards: bool = False
    """The last candidate first: for a second process beside the first."""
    out: Path = Path("reports/plan-ends")
    """Where the table goes."""
    work: Path = Path("runs/plan-ends")
    """Where the search and checkpoints are; goes on from what is there."""


Cut = tuple[str, Callable[[], nn.Module], float, str]


def candidates(arguments: Arguments, job: Job[SlimConfig]) -> list[Cut]:
    """(candidate, what makes its network as cut and fitted, its loss on validation images, its blocks) of all that the search tried."""
    cell = Cell(0, "macs_ratio", arguments.macs_ratio, arguments.work, arguments.work)
    starts = starts_of(job, cell)
    dense, files = with_names(job.original, job), Files.of(arguments.work, "auto")
    reference = count_macs(dense, job.data.train.example(1))
    budget = Budget.from_config(job.config.prune, "macs_ratio", arguments.macs_ratio, reference_macs=reference)
    found = auto.choose_plan(dense, starts, budget, job, files)

    def cut(name: str) -> nn.Module:
        if name in found.plans:
            plan = found.plans[name]
            plain, _ = carry_out_blocks(dense, plan["blocks"], job.examples)
            cutter = make_cutter(plain, auto._FREE, job, budget, plan["widths"])
        else:
            preset = auto._preset(name)
            cutter = make_cutter(starts(preset.start), preset, job, budget)
        return cutter.once(cutter.network, met(budget, cutter, files.named(name)))

    blocks = {name: " ".join(plan["blocks"].values()) for name, plan in found.plans.items()}
    return [
        (name, functools.partial(cut, name), verdict["loss"], blocks.get(name, ""))
        for name, verdict in found.verdicts.items()
        if "loss" in verdict
    ]


def main(arguments: Arguments) -> None:
    """Search, train, compare."""
    prune = PruneConfig(macs_ratio=(arguments.macs_ratio,), round_to=arguments.round_to)
    tuning = TrainConfig(epochs=arguments.epochs, learning_rate=0.06, warmup_epochs=1.0, distillation=0.5)
    config = SlimConfig(
        model=arguments.model, width=arguments.width, prune=prune, finetune=tuning, out=arguments.work,
        data=DataConfig(dataset=arguments.dataset, train_images=arguments.train_images), search_minutes=arguments.minutes,
    )  # fmt: skip
    data, cpu = load_dataset(config.data), torch.device("cpu")
    dense = artifact.load(arguments.dense).eval()
    arguments.work.mkdir(parents=True, exist_ok=True)
    job = Job(config, data, cpu, 0, teacher=dense, memory=arguments.work / "teacher")
    rows: list[dict[str, Any]] = []
    short = dataclasses.replace(tuning, epochs=1, warmup_epochs=0.1)
    tried = candidates(arguments, job)
    for name, cut, before, blocks in reversed(tried) if arguments.backwards else tried:
        note = arguments.work / f"{name}.json"
        row: dict[str, Any] = {"candidate": name, "blocks": blocks, "before": before} | read_notes(note)
        wanted = [
            *(f"after {images}" for images in arguments.images),
            *(f"test {seed}" for seed in range(arguments.seeds)),
        ]
        network = nn.Identity() if set(wanted) <= set(row) else cut()
        for images in arguments.images:
            key = f"after {images}"
            if key not in row:
                part = dataclasses.replace(job, data=dataclasses.replace(data, train=Part(data.train, images)))
                files = Files.of(arguments.work / f"part-{images}", name)
                row[key] = evaluate(tune(network, short, part, files), data.validation, device=cpu).loss
        for seed in range(arguments.seeds):
            if f"loss {seed}" not in row:
                files = Files.of(arguments.work / f"end-{seed}", name)
                end = tune(network, tuning, dataclasses.replace(job, seed=seed), files)
                test, row[f"loss {seed}"] = (
                    evaluate(end, data.test, device=cpu),
                    evaluate(end, data.validation, device=cpu).loss,
                )
                row |= {f"test loss {seed}": test.loss, f"test {seed}": test.accuracy}
        write_text(note, pd.Series(row).to_json())
        rows.append(row)
        console.print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    table = pd.DataFrame(rows)
    ends = range(arguments.seeds)
    table["test"] = table[[f"test {seed}" for seed in ends]].mean(axis=1)
    table["test loss"] = table[[f"test loss {seed}" for seed in ends]].mean(axis=1)
    said = ["before", *(f"after {images}" for images in arguments.images)]
    lines = [
        "| loss on validation images | with test loss | with test accuracy | best half, with test loss | test accuracy of the least |",
        "| --- | --- | --- | --- | --- |",
    ]
    half = table[table["test loss"] <= table["test loss"].median()]
    for column in said:
        ranks, inner = (
            table.corr("spearman", numeric_only=True)[column],
            half.corr("spearman", numeric_only=True)[column],
        )
        least = table.loc[table[column].idxmin(), "test"]
        lines.append(
            f"| {column} | {ranks['test loss']:.2f} | {-ranks['test']:.2f} | {inner['test loss']:.2f} | {least:.2%} |"
        )
    both = table.corr("spearman", numeric_only=True)
    if arguments.seeds > 1:
        lines.append(
            f"| two ends with each other | {both.loc['test loss 0', 'test loss 1']:.2f} | {both.loc['test 0', 'test 1']:.2f} | {half.corr('spearman', numeric_only=True).loc['test loss 0', 'test loss 1']:.2f} | {table.test.max():.2%} |"
        )
    write_text(arguments.out / "plans.csv", table.round(5).to_csv(index=False))
    command = shlex.join(["python", "experiments/plan_ends.py", *sys.argv[1:]])
    page = (
        f"# What the end of a plan can be told from\n\n`{command}`: {len(table)} candidates.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    write_text(arguments.out / "README.md", page)
    console.print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
