"""Accuracy against depth: RepVGG, RepVGG with a reserve ratio, and ResNet of equal width, with what training and deployment cost.

    python experiments/depth_study.py                 # trains what is missing, then measures; writes reports/depth-fashion
    python experiments/depth_study.py --no-measure    # training only, for a machine that does other things beside it

Fashion-MNIST, a fixed part of its training images, tested on all 10,000. Four stages at 14x14 to 2x2 (a stem of stride 2), a
quarter of the work of the full size. ResNets have as many residual blocks as RepVGG has pairs: 10, 18, 34, 66 layers beside 13, 21,
37, 69. Every network is deployed by `rmprune.remove_residuals`; a ResNet also as it is. Goes on where it was interrupted.
"""

import multiprocessing
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import rmprune
from rmprune.artifact import files as artifact
from rmprune.config import DataConfig, TrainConfig
from rmprune.data.load import load_dataset
from rmprune.measure.memory import PeakMemory
from rmprune.report.figures import save_figure
from rmprune.training import evaluate, fit

RESNETS = {13: "resnet10", 21: "resnet18", 37: "resnet34", 69: "resnet66"}
COLOURS = {
    "RepVGG": "tab:red",
    "reserve ratio 0.25": "tab:orange",
    "reserve ratio 0.5": "tab:green",
    "reserve ratio 0.75": "tab:blue",
    "ResNet": "black",
    "ResNet, residuals removed": "grey",
}
console = Console()


@dataclass(frozen=True)
class Settings:
    """The depth study."""

    depths: tuple[int, ...] = (13, 21, 37, 69)
    """Depths of RepVGG (8n + 5)."""
    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    """Reserve ratios; 0 is RepVGG."""
    seeds: int = 2
    """Trainings of each network."""
    width: int = 8
    """Channels of the first stage."""
    train_images: int = 20_000
    """A fixed part of Fashion-MNIST's training images."""
    epochs: int = 8
    """Passes over them."""
    learning_rate: float = 0.1
    """Peak learning rate; cosine, one epoch of warm-up."""
    data_dir: Path | None = None
    """Where Fashion-MNIST lies, if not where Debian puts it."""
    threads: int = 2
    """Threads of training and measuring."""
    measure: bool = True
    """Measure when everything is trained; needs a quiet machine."""
    memory_only: bool = False
    """Measure the memory of training again and leave the rest of the table as it is; needs no quiet machine."""
    runs: Path = Path("runs/depth-fashion")
    """Where the trained networks go."""
    out: Path = Path("reports/depth-fashion")
    """Where the table and the figure go."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    depth: int
    ratio: float | None  # None: a ResNet
    seed: int

    @property
    def model(self) -> str:
        return "resnet" if self.ratio is None else "repvgg"

    @property
    def name(self) -> str:
        return f"{self.model}-{self.depth}" + ("" if self.ratio is None else f"-r{self.ratio:g}") + f"-seed{self.seed}"

    def build(self, width: int) -> nn.Module:
        torch.manual_seed(self.seed)
        shared = {"num_classes": 10, "in_channels": 1, "width": width, "small_images": True}
        if self.ratio is None:
            return rmprune.models.create(RESNETS[self.depth], stem_stride=2, **shared)
        return rmprune.models.create(
            "repvgg", depth=self.depth, reserve_ratio=self.ratio, stem_strides=(2, 1), **shared
        )


def train(cell: Cell, settings: Settings) -> None:
    """Train, test and deploy one network; artifacts `dense` and `plain` with the facts."""
    folder = settings.runs / cell.name
    if artifact.is_artifact(folder / "plain"):
        return
    data = load_dataset(
        DataConfig("fashion-mnist", settings.data_dir, batch_size=128, train_images=settings.train_images)
    )
    config = TrainConfig(
        epochs=settings.epochs, learning_rate=settings.learning_rate, weight_decay=1e-4, precision="float32"
    )
    model = fit(
        cell.build(settings.width),
        data,
        config,
        seed=cell.seed,
        checkpoint=folder / "checkpoint.pt",
        log=folder / "log.jsonl",
        label=cell.name,
    )
    removal = rmprune.remove_residuals(model, data.train.example(256), batch_norm=False)
    assert not removal.kept, removal.kept
    facts = {
        "accuracy": evaluate(model, data.test).accuracy,
        "max_error": removal.max_error,
        "macs": rmprune.count_macs(removal.model, data.test.example(1)),
        "train_macs": rmprune.count_macs(model, data.test.example(1)),
    }
    console.print(f"{cell.name}: {facts['accuracy']:.2%}, deployed with error {facts['max_error']:.1e}")
    artifact.save(model, folder / "dense", extra=facts)
    artifact.save(removal.model, folder / "plain", extra=facts)


def step_seconds(cell: Cell, settings: Settings, steps: int = 12) -> tuple[float, float]:
    """Median seconds of a training step of 128 images, and the MiB that steps add to a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_step_seconds, (cell, settings, steps))


def _step_seconds(cell: Cell, settings: Settings, steps: int) -> tuple[float, float]:
    torch.set_num_threads(settings.threads)
    model = cell.build(settings.width).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    x = torch.randn(128, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (128,))
    nn.functional.conv2d(x, torch.randn(1, 1, 3, 3))  # the libraries' own memory is there before the count starts
    times = []
    with PeakMemory() as peak:
        for _ in range(steps):
            start = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:]), peak.mib


def measure(cells: list[Cell], settings: Settings) -> pd.DataFrame:
    """One row for each network and measurement; training steps in three turns, deployed networks interleaved."""
    steps: dict[Cell, list[tuple[float, float]]] = {cell: [] for cell in cells}
    for turn in range(3):
        for cell in cells:
            if cell.seed == 0:  # seeds differ in weights, not in cost
                steps[cell].append(step_seconds(cell, settings))
        console.print(f"training steps: turn {turn + 1} of 3")
    networks = {}
    for cell in cells:
        networks[cell, "plain"] = artifact.load(settings.runs / cell.name / "plain")
        if cell.ratio is None:
            networks[cell, "dense"] = artifact.load(settings.runs / cell.name / "dense")
    rows = []
    for depth in settings.depths:  # a depth is what is compared, so it is what is interleaved
        group = {key: net for key, net in networks.items() if key[0].depth == depth}
        latencies = rmprune.measure.measure_latencies(
            {f"{cell.name}/{form}": net for (cell, form), net in group.items()},
            torch.randn(1, 1, 28, 28),
            backends=("onnxruntime", "openvino", "eager"),
            threads=(settings.threads,),
            batch_sizes=(1, 32),
            seconds=1.0,
            reference=None,
        )
        for (cell, form), net in group.items():
            facts = artifact.read_extra(settings.runs / cell.name / "plain")
            own = steps[Cell(cell.depth, cell.ratio, 0)]
            shared = {
                "model": cell.model + ("-rm" if cell.ratio is None and form == "plain" else ""),
                "depth": cell.depth,
                "reserve_ratio": cell.ratio,
                "seed": cell.seed,
                "accuracy": facts["accuracy"],
                "train_images_per_s": round(128 / statistics.median(s for s, _ in own)),
                "train_peak_mib": round(statistics.median(m for _, m in own)),
                "train_macs": facts["train_macs"],
                "macs": rmprune.count_macs(net, torch.randn(1, 1, 28, 28)),
                "params": rmprune.measure.count_params(net),
                "max_error": facts["max_error"],
            }
            for latency in latencies[f"{cell.name}/{form}"]:
                times = {key: getattr(latency, key) for key in ("backend", "threads", "batch_size", "median_ms")}
                rows.append(shared | times | {"q1_ms": latency.q1_ms, "q3_ms": latency.q3_ms})
        console.print(f"deployed networks of depth {depth}: measured")
    return pd.DataFrame(rows)


def with_memory(cells: list[Cell], settings: Settings) -> pd.DataFrame:
    """The table as it lies there with `train_peak_mib` measured again."""
    table = pd.read_csv(settings.out / "results.csv")
    for cell in cells:
        if cell.seed == 0:
            same = table.reserve_ratio.isna() if cell.ratio is None else table.reserve_ratio == cell.ratio
            table.loc[same & (table.depth == cell.depth), "train_peak_mib"] = round(step_seconds(cell, settings, 3)[1])
    return table


def figure(table: pd.DataFrame) -> Figure:
    """Accuracy, training speed and deployed time against depth."""
    result = Figure(figsize=(13, 4), layout="constrained")
    panels = [
        ("accuracy", "test accuracy (%)", 100.0),
        ("train_images_per_s", "training, images a second", 1.0),
        ("median_ms", "deployed, ms (ONNX Runtime, batch 1)", 1.0),
    ]
    shown = table[(table.backend == "onnxruntime") & (table.batch_size == 1)]
    for ax, (column, label, factor) in zip(result.subplots(1, 3), panels, strict=True):
        for (model, ratio), rows in shown.groupby(["model", "reserve_ratio"], dropna=False, sort=False):
            if model == "resnet-rm" and column != "median_ms":
                continue
            by_depth = rows.groupby("depth")[column].agg(["mean", "min", "max"]) * factor
            name = "RepVGG" if ratio == 0 else f"reserve ratio {ratio:g}"
            if model != "repvgg":
                name = "ResNet" + (", residuals removed" if model == "resnet-rm" else "")
            spread = [by_depth["mean"] - by_depth["min"], by_depth["max"] - by_depth["mean"]]
            ax.errorbar(
                by_depth.index,
                by_depth["mean"],
                yerr=spread,
                label=name,
                color=COLOURS.get(name),
                marker="o",
                capsize=2,
            )
        ax.set(xlabel="depth (3x3 layers of RepVGG)", ylabel=label, xscale="log")
        ax.set_xticks(sorted(set(shown.depth)), [str(depth) for depth in sorted(set(shown.depth))], minor=False)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    result.axes[1].set_yscale("log")
    result.axes[2].legend(frameon=False, fontsize=8)
    return result


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    cells = [
        Cell(depth, ratio, seed)
        for seed in range(settings.seeds)
        for depth in settings.depths
        for ratio in (*settings.ratios, None)
    ]
    for number, cell in enumerate(cells, 1):
        console.print(f"[{number}/{len(cells)}] {cell.name}")
        train(cell, settings)
    if not settings.measure:
        return
    table = with_memory(cells, settings) if settings.memory_only else measure(cells, settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(settings.out / "results.csv", index=False)
    save_figure(figure(table), settings.out / "depth")
    with (settings.out / "command.txt").open("a" if settings.memory_only else "w") as file:
        file.write("python " + shlex.join(sys.argv) + "\n")
    console.print(f"{settings.out}/results.csv and depth.png written")


if __name__ == "__main__":
    main(tyro.cli(Settings))
