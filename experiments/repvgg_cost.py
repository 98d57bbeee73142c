"""What a reserve ratio costs beside RepVGG: a training step, its memory, and the deployed network's time.

    python experiments/repvgg_cost.py            # writes reports/repvgg-cost/{cost.csv,cost.md,command.txt}

Training steps of all ratios take turns in one process, so a ratio of times is paired turn by turn; peak memory is read in a process
of its own for each. Deployed networks come from `rmprune.remove_residuals`, batch norms folded, and are measured by
`rmprune.measure.measure_latencies`, in turns as well. RepVGG is there twice: its second row says what a ratio of equals looks like.
"""

import multiprocessing
import random
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from rich.console import Console
from torch import nn

import rmprune
from rmprune.config import Precision
from rmprune.training.precision import autocast

AGAIN = "RepVGG again"
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
GOAL = 0.05  # deployed time ratios lie within 1 +- this
console = Console()


@dataclass(frozen=True)
class Settings:
    """What to compare with RepVGG, and on how many threads."""

    depths: tuple[int, ...] = (21, 37)
    """Depths of RepVGG (8n + 5)."""
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Reserve ratios."""
    width: int = 32
    """Channels of the first stage."""
    image_size: int = 28
    """Height and width of the images."""
    train_batch: int = 64
    """Images in a training step."""
    rounds: int = 7
    """Turns of each network; a turn is one training step."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Images in a batch of the deployed networks."""
    backends: tuple[str, ...] = ("onnxruntime", "openvino")
    """Runtimes of the deployed networks."""
    seconds: float = 1.5
    """Time spent on each deployed network and configuration."""
    min_rounds: int = 9
    """Turns of each deployed network at least."""
    threads: int = 2
    """Threads of everything."""
    out: Path = Path("reports/repvgg-cost")
    """Where the tables go."""


def network(depth: int, ratio: float, settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    return rmprune.models.create(
        "repvgg", depth=depth, reserve_ratio=ratio, num_classes=10, width=settings.width, small_images=True
    )


def training_step(model: nn.Module, precision: Precision, settings: Settings) -> Callable[[], None]:
    """One step of the model as `rmprune.training` does it: channels-last, SGD with Nesterov momentum."""
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    x = torch.randn(settings.train_batch, 3, settings.image_size, settings.image_size)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (settings.train_batch,))

    def step() -> None:
        optimizer.zero_grad()
        with autocast(precision, torch.device("cpu")):
            output = model(x)
        nn.functional.cross_entropy(output.float(), y).backward()
        optimizer.step()

    return step


def step_seconds(depth: int, precision: Precision, settings: Settings) -> dict[str, list[float]]:
    """Seconds of the training steps of each network, by turn."""
    steps = {
        name: training_step(network(depth, ratio, settings), precision, settings)
        for name, ratio in candidates(settings).items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for turn in range(-2, settings.rounds):  # the first two warm up
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name]()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def step_peak_mib(depth: int, ratio: float, precision: Precision, settings: Settings) -> float:
    """MiB that two training steps, network and optimiser included, add to this process at their peak."""
    torch.set_num_threads(settings.threads)
    small = Settings(width=4, image_size=8, train_batch=2)
    training_step(network(13, 0.5, small), precision, small)()  # the libraries' own memory comes before the count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = training_step(network(depth, ratio, settings), precision, settings)
    for _ in range(2):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def candidates(settings: Settings) -> dict[str, float]:
    """Reserve ratio by name; RepVGG first, the reference."""
    return {"RepVGG": 0.0, AGAIN: 0.0} | {f"reserve {ratio:g}": ratio for ratio in settings.ratios}


def training_rows(depth: int, settings: Settings) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    x = torch.zeros(1, 3, settings.image_size, settings.image_size)
    for precision in PRECISIONS:
        times = step_seconds(depth, precision, settings)
        for name, ratio in candidates(settings).items():
            with multiprocessing.get_context("forkserver").Pool(1) as pool:
                peak = pool.apply(step_peak_mib, (depth, ratio, precision, settings))
            paired = [own / base for own, base in zip(times[name], times["RepVGG"], strict=True)]
            q1, middle, q3 = statistics.quantiles(paired, n=4, method="inclusive")
            seconds = statistics.median(times[name])
            rows.append(
                {
                    "what": "training step",
                    "depth": depth,
                    "network": name,
                    "reserve_ratio": ratio,
                    "backend": "eager",
                    "precision": precision,
                    "threads": settings.threads,
                    "batch_size": settings.train_batch,
                    "macs": rmprune.count_macs(network(depth, ratio, settings).eval(), x),
                    "median_ms": seconds * 1e3,
                    "images_per_s": settings.train_batch / seconds,
                    "time_ratio": middle,
                    "time_ratio_q1": q1,
                    "time_ratio_q3": q3,
                    "rounds": settings.rounds,
                    "peak_mib": peak,
                }
            )
        console.print(f"depth {depth}: training steps in {precision} timed")
    return rows


def deployed(depth: int, ratio: float, settings: Settings) -> nn.Module:
    """The plain form of a network whose batch norms have the statistics of one batch, so that maps keep a sane scale."""
    model = network(depth, ratio, settings)
    x = torch.randn(8, 3, settings.image_size, settings.image_size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(x)
    removal = rmprune.remove_residuals(model.eval(), x, batch_norm=False)
    assert not removal.kept, removal.kept
    return removal.model


def deployed_rows(depth: int, settings: Settings) -> list[dict[str, object]]:
    x = torch.randn(1, 3, settings.image_size, settings.image_size)
    plain = {name: deployed(depth, ratio, settings) for name, ratio in candidates(settings).items()}
    latencies = rmprune.measure.measure_latencies(
        plain,
        x,
        backends=settings.backends,
        threads=(settings.threads,),
        batch_sizes=settings.batch_sizes,
        seconds=settings.seconds,
        min_rounds=settings.min_rounds,
        reference="RepVGG",
        progress=lambda configuration: console.print(f"depth {depth}, deployed: {configuration}"),
    )
    return [
        {
            "what": "deployed",
            "depth": depth,
            "network": name,
            "reserve_ratio": ratio,
            "backend": latency.backend,
            "precision": "float32",
            "threads": latency.threads,
            "batch_size": latency.batch_size,
            "macs": rmprune.count_macs(plain[name], x),
            "median_ms": latency.median_ms,
            "images_per_s": latency.batch_size / latency.median_ms * 1e3,
            "time_ratio": latency.ratio,
            "time_ratio_q1": latency.ratio_q1,
            "time_ratio_q3": latency.ratio_q3,
            "rounds": latency.rounds,
            "peak_mib": None,
        }
        for name, ratio in candidates(settings).items()
        for latency in latencies[name]
    ]


def span(ratios: "pd.Series[float]") -> str:
    return f"{ratios.min():.3f} to {ratios.max():.3f}"


def verdict(table: pd.DataFrame) -> list[str]:
    """What the table says about the two goals: deployed 1.0 +- 0.05, a training step at most as expensive as RepVGG's."""
    plain, steps = (table[table.what == what] for what in ("deployed", "training step"))
    compared = plain[plain.reserve_ratio > 0].time_ratio
    lines = [
        f"- Deployed: {((compared - 1).abs() <= GOAL).sum()} of {len(compared)} ratios lie within {1 - GOAL:.2f} to {1 + GOAL:.2f} "
        f"({span(compared)}; RepVGG to itself {span(plain[plain.network == AGAIN].time_ratio)})."
    ]
    for precision, turns in steps.groupby("precision", sort=False):
        base = turns[turns.network == "RepVGG"]
        lines.append(
            f"- Training step, {precision}: RepVGG to itself {span(turns[turns.network == AGAIN].time_ratio)}."
        )
        for ratio, rows in turns[turns.reserve_ratio > 0].groupby("reserve_ratio"):
            worst = rows.time_ratio.max()
            words = "at most RepVGG's" if worst <= 1 else f"up to {worst - 1:.1%} more than RepVGG's"
            lines.append(
                f"- Training step, {precision}, reserve ratio {ratio:g}: {span(rows.time_ratio)} of RepVGG's time, {words}; "
                f"{rows.macs.sum() / base.macs.sum():.2f} of its MACs, {rows.peak_mib.sum() / base.peak_mib.sum():.2f} of its memory."
            )
    return lines


def report(table: pd.DataFrame, command: str, settings: Settings) -> str:
    lines = [
        "# What a reserve ratio costs beside RepVGG",
        "",
        f"Made by `{command}`: width {settings.width}, {settings.image_size}x{settings.image_size} images, "
        f"threads: {settings.threads}. Ratios of times are medians of ratios turn by turn, with quartiles; the training network's MACs "
        "are those of one image forward.",
        "",
        *verdict(table),
        "",
    ]
    for what, rows in table.groupby("what", sort=False):
        memory = what == "training step"
        heads = ["depth", "network", "backend", "batch", "MMACs", "ms", "images/s", "time over RepVGG's", "quartiles"]
        heads += ["peak MiB"] if memory else []
        lines += [
            f"## {str(what).capitalize()}",
            "",
            f"| {' | '.join(heads)} |",
            "| --- " * 3 + "| ---: " * (len(heads) - 3) + "|",
        ]
        for row in rows.sort_values(["depth", "backend", "precision", "batch_size"], kind="stable").itertuples():
            cells = [row.depth, row.network, f"{row.backend}, {row.precision}", row.batch_size]
            cells += [
                f"{row.macs / 1e6:.1f}",
                f"{row.median_ms:.2f}",
                f"{row.images_per_s:.0f}",
                f"{row.time_ratio:.3f}",
            ]
            cells += [f"{row.time_ratio_q1:.3f} to {row.time_ratio_q3:.3f}"]
            cells += [f"{row.peak_mib:.0f}"] if memory else []
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "rmprune", "rmprune.training"])
    command = "python " + shlex.join(sys.argv)
    rows = []
    for depth in settings.depths:
        rows += training_rows(depth, settings)
        rows += deployed_rows(depth, settings)
    table = pd.DataFrame(rows).sort_values("what", ascending=False, kind="stable")
    settings.out.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(settings.out / "cost.csv", index=False)
    (settings.out / "cost.md").write_text(report(table, command, settings))
    (settings.out / "command.txt").write_text(command + "\n")
    console.print("\n".join(verdict(table)), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{settings.out}/cost.md and cost.csv written")


if __name__ == "__main__":
    main(tyro.cli(Settings))
