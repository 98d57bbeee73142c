"""Two ways to do one thing, timed in turns in one process: the table of their rates. What is timed stands in the experiments."""

import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rmprune.measure.machine import environment
from rmprune.training.precision import compute_dtype


def write_rates(
    out: Path, what: str, unit: str, rates: dict[str, list[float]], device: str, threads: int, **facts: Any
) -> None:
    """One row for each of `rates`, the usual way first, which computes in float32, ours last. `facts`: columns; a dict says each row's."""
    base = statistics.median(next(iter(rates.values())))
    fast = str(compute_dtype("auto", torch.device(device))).removeprefix("torch.")
    table = pd.DataFrame(
        {
            what: name,
            unit: round(statistics.median(values), 1),
            "lowest": round(min(values), 1),
            "highest": round(max(values), 1),
            "relative": round(statistics.median(values) / base, 3),
            "precision": fast if name == "rmprune" else "float32",
            **{fact: value[name] if isinstance(value, dict) else value for fact, value in facts.items()},
            "device": device,
            "threads": threads,
            "processor": environment()["processor"],
            "torch": torch.__version__,
            "command": shlex.join(["python", *sys.argv]),
        }
        for name, values in rates.items()
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    print(table.to_string(index=False))
