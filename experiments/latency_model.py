"""How well the latency model predicts whole networks: fitted on a few, judged on others that it has not seen.

    python experiments/latency_model.py        # writes reports/latency-model/{validation.csv,validation.md,command.txt}

As a search uses it: for each network the model is fitted on four uniform widths of it, and judged on random widths in eights: ResNet-20
with its residuals and without, MobileNetV2 as it is and turned V1. All layers are measured in turns, and so are a network's fitted and
judged widths: over minutes the times of a shared machine drift by more than the goal.
"""

import itertools
import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

import rmprune
from rmprune.measure.latency_model import LatencyModel
from rmprune.measure.layers import TimedLayer, network_layers
from rmprune.measure.machine import environment
from rmprune.pruning import find_structure, shrink
from rmprune.pruning.allocate import keep_best

GOAL = 0.10
console = Console()


@dataclass(frozen=True)
class Settings:
    """Where time is predicted."""

    backends: tuple[str, ...] = ("onnxruntime",)
    """Runtimes."""
    threads: tuple[int, ...] = (1, 2)
    """Threads of the runtime, one after the other."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Images in a batch."""
    seconds: float = 1.0
    """Time spent on each whole network."""
    out: Path = Path("reports/latency-model")
    """Where the tables go."""


def cut(model: nn.Module, x: Tensor, fraction: Tensor | float, seed: int = 0) -> nn.Module:
    """The network at this fraction of every width, or at random fractions between two bounds; in multiples of 8."""
    structure, chance = find_structure(model, x), random.Random(seed)
    keep = {}
    for group in structure.groups:
        part = fraction if isinstance(fraction, float) else chance.uniform(*fraction.tolist())
        units = max(1, round(part * group.units * group.multiple / 8) * 8 // group.multiple)
        keep[group.name] = keep_best(torch.rand(group.units), min(units, group.units))
    return shrink(model, keep, structure)[0].eval()


def networks() -> dict[str, tuple[dict[str, nn.Module], dict[str, nn.Module]]]:
    """{network: (uniform widths to fit on, random widths to judge by)}, for images of 1x28x28."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 28, 28)
    resnet = rmprune.models.create("resnet20", num_classes=10, in_channels=1, width=32).eval()
    mobile = rmprune.models.create("mobilenet_v2_small", num_classes=10, in_channels=1, width=0.5).eval()
    whole = {
        "resnet20": resnet,
        "resnet20 plain": rmprune.remove_residuals(resnet, x).model,
        "mobilenet_v2 x 0.5": mobile,
        "mobilenet_v2 x 0.5 turned V1": rmprune.remove_residuals(mobile, x, fuse="always").model,
    }
    some, few = torch.tensor([0.2, 0.8]), torch.tensor([0.1, 0.5])
    return {
        name: (
            {name: model, **{f"{name} x {part:g}": cut(model, x, part) for part in (0.75, 0.5, 0.3)}},
            {f"{name}, widths {n}": cut(model, x, bounds, n) for n, bounds in enumerate((some, some, few), 1)},
        )
        for name, model in whole.items()
    }


def layers_of(parts: tuple[dict[str, nn.Module], ...], x: Tensor) -> list[TimedLayer]:
    """The layers of all these networks."""
    return [layer for part in parts for network in part.values() for layer in network_layers(network, x)]


def main(settings: Settings) -> None:
    families = networks()
    x, tables = torch.randn(1, 1, 28, 28), []
    for backend, threads, batch_size in itertools.product(settings.backends, settings.threads, settings.batch_sizes):
        start = time.perf_counter()
        model = LatencyModel(backend, threads=threads, batch_size=batch_size)
        model.require(layer for parts in families.values() for layer in layers_of(parts, x))
        for fit, judge in families.values():
            table = model.calibrate(fit, x, unseen=judge, seconds=settings.seconds)
            table = table.assign(backend=backend, threads=threads, batch_size=batch_size)
            table["part"] = table.model.map(lambda name, judge=judge: "judged" if name in judge else "fitted")
            tables.append(table)
            console.print(table[["model", "part", "predicted_ms", "measured_ms", "error"]].round(3).to_string())
        console.print(
            f"{backend}, {threads} threads, batch {batch_size}: {len(model.table)} layers measured in "
            f"{time.perf_counter() - start:.0f} s"
        )
    result = pd.concat(tables)
    settings.out.mkdir(parents=True, exist_ok=True)
    result.to_csv(settings.out / "validation.csv", index=False)
    judged = result[result.part == "judged"]
    summary = [
        f"{backend}, threads {threads}, batch {batch_size}: {(part.error.abs() < GOAL).sum()} of {len(part)} within the "
        f"goal; mean absolute error {part.error.abs().mean():.1%}, largest {part.error.abs().max():.1%}."
        for (backend, threads, batch_size), part in judged.groupby(["backend", "threads", "batch_size"])
    ]
    command, here = "python " + shlex.join(sys.argv), environment()
    lines = [
        "# Predicted against measured time of whole networks",
        "",
        f"Made by `{command}` on {here['processor']}. Fitted on uniform widths of each network; these (random widths) were not seen.",
        f"Goal: an error below {GOAL:.0%}.",
        "",
        "| runtime | threads | batch | network | predicted ms | measured ms | error |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
        *[
            f"| {row['backend']} | {row['threads']} | {row['batch_size']} | {row['model']} | {row['predicted_ms']:.3f} "
            f"| {row['measured_ms']:.3f} | {row['error']:+.1%}{'' if abs(row['error']) < GOAL else ' (misses)'} |"
            for row in judged.to_dict("records")
        ],
        "",
        "\n\n".join(summary),
    ]
    (settings.out / "validation.md").write_text("\n".join(lines) + "\n")
    (settings.out / "command.txt").write_text(command + "\n")
    console.print("\n".join(summary))


if __name__ == "__main__":
    main(tyro.cli(Settings))
