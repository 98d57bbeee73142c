"""One training on one process and on two (docs/beyond-one-machine.md): time, CPU time and accuracy, into reports/processes.csv.

    nice -n 10 python experiments/processes.py --seeds 3 --epochs 10

Each row is a `train` of ResNet-20 on the digits, one thread for each process, batch 64: alone, under torchrun with two processes, and with
shared batch-norm statistics. CPU seconds count all processes, the start of Python and the measuring of both networks included; on a
machine that others use they are what can be compared, and wall seconds are not.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = {"one": (1, ()), "two": (2, ()), "two, shared statistics": (2, ("--sync-batch-norm",))}
FIELDS = (
    "processes",
    "seed",
    "accuracy",
    "validation_accuracy",
    "train_loss",
    "epoch_seconds",
    "wall_seconds",
    "cpu_seconds",
)


def run(processes: int, flags: tuple[str, ...], seed: int, epochs: int, out: Path) -> dict[str, object]:
    """Train once, and what became of it."""
    start = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes)) if processes > 1 else ()
    measure = ("--measure.backend", "eager", "--measure.seconds", "0", "--measure.min-rounds", "1")
    training = (
        "--model",
        "resnet20",
        "--device",
        "cpu",
        "--epochs",
        str(epochs),
        "--seed",
        str(seed),
        "--precision",
        "float32",
    )
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, *start, "-m", "rmprune", "train", *training, *measure, *flags, "--out", str(out)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    record = json.loads((out / "record.json").read_text())
    curve = record["training"]["dense"]
    return {
        "accuracy": record["original"]["accuracy"],
        "validation_accuracy": curve[-1]["validation_accuracy"],
        "train_loss": curve[-1]["train_loss"],
        "epoch_seconds": sorted(epoch["seconds"] for epoch in curve)[len(curve) // 2],
        "wall_seconds": wall,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("reports/processes.csv"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for seed in range(options.seeds):
            for name, (processes, flags) in WAYS.items():
                found = run(processes, flags, seed, options.epochs, Path(folder) / f"{name}-{seed}")
                row = {"processes": name, "seed": seed} | found
                writer.writerow(
                    {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
                )
                file.flush()


if __name__ == "__main__":
    main()
