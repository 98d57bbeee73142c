"""Does measuring repeat itself? The same pair of networks, measured again and again, each time in a process of its own.

    python experiments/measure_repeatability.py

Goal on an idle 2-core machine: all ratios of a configuration within 3 % of each other. It takes about 12 minutes. What the machine was
like is measured before and after (`quietness`). Writes repeats.csv (a row as it comes), summary.csv and command.txt under --out.
"""

import multiprocessing
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from torch import nn

import rmprune
from rmprune.measure.machine import environment
from rmprune.measure.quiet import quietness

GOAL = 0.03


@dataclass(frozen=True)
class Settings:
    model: str = "resnet20"
    """The reference; it is compared with its plain form, which removal makes."""
    image_size: int = 32
    repeats: int = 10
    backends: tuple[str, ...] = ("onnxruntime", "eager", "openvino")
    threads: tuple[int, ...] = (1, 2)
    batch_sizes: tuple[int, ...] = (1, 32)
    seconds: float = 1.0
    """For each network and configuration."""
    out: Path = Path("reports/repeatability")


def pair(settings: Settings) -> tuple[dict[str, nn.Module], torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 3, settings.image_size, settings.image_size)
    net = rmprune.models.create(settings.model, num_classes=10).eval()
    return {"residual": net, "plain": rmprune.remove_residuals(net, x).model}, x


def measure_once(settings: Settings, repeat: int) -> list[dict[str, Any]]:
    networks, x = pair(settings)
    found = rmprune.measure_latencies(
        networks,
        x,
        backends=settings.backends,
        threads=settings.threads,
        batch_sizes=settings.batch_sizes,
        seconds=settings.seconds,
        reference="residual",
        seed=repeat,
    )["plain"]
    return [{"repeat": repeat, "spread": latency.spread, **latency.to_dict()} for latency in found]


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """For each configuration the ratios of all repeats: least, median, greatest, and how far they lie apart."""
    ratios = table.groupby(["backend", "threads", "batch_size"], sort=False).ratio.agg(
        ["min", "median", "max", "count"]
    )
    ratios["apart"] = ratios["max"] / ratios["min"] - 1
    inside = [
        ((part.ratio_low <= part.ratio.median()) & (part.ratio.median() <= part.ratio_high)).mean()
        for _, part in table.groupby(["backend", "threads", "batch_size"], sort=False)
    ]
    return ratios.assign(within_goal=ratios.apart <= GOAL, median_in_interval=inside).reset_index()


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    here, rows, start = environment(), [], time.perf_counter()
    command = shlex.join(["python", *sys.argv])
    print(f"{here['processor']}, {here['cores']} cores; before: {quietness()}", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for repeat in range(settings.repeats):
            rows += processes.submit(measure_once, settings, repeat).result()
            pd.DataFrame(rows).to_csv(settings.out / "repeats.csv", index=False)
            left = (time.perf_counter() - start) / (repeat + 1) * (settings.repeats - repeat - 1) / 60
            print(f"{repeat + 1} of {settings.repeats} measured, {left:.1f} min left", flush=True)
    after = quietness()
    summary = summarise(pd.DataFrame(rows))
    summary.to_csv(settings.out / "summary.csv", index=False)
    (settings.out / "command.txt").write_text(f"{command}\n{here}\nafter: {after}\n")
    print(summary.round(4).to_string(index=False))
    print(f"after: {after}\n{int(summary.within_goal.sum())} of {len(summary)} configurations within {GOAL:.0%}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
