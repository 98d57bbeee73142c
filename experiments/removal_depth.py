"""Time and error of RM against depth: CIFAR ResNets from 20 to 1202 layers, random weights, scales and shifts.

    python experiments/removal_depth.py            # writes reports/removal-depth/{depth.csv,depth.png,command.txt}

The time is that of `remove_residuals` as a user calls it, its check in float64 included, in a process that did nothing else. All
errors are to the original in float64: of removal itself (error_float64, relative to what the inputs change in the outputs), and,
relative to its largest output, of what float32 does to the original, to the plain network, and to the plain network in ONNX Runtime
(batch norms folded).
"""

import multiprocessing
import resource
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import onnxruntime
import pandas as pd
import torch
import tyro
from rich.console import Console

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import rmprune
from rmprune.graph.fold import fold_batch_norms
from rmprune.onnx.export import onnx_bytes


@dataclass(frozen=True)
class Config:
    """Time and error of RM against depth."""

    depths: tuple[int, ...] = (20, 56, 110, 218, 434, 866, 1202)
    """Depths of the CIFAR ResNets (6n + 2)."""
    threads: int = 2
    """Threads of torch."""
    out: Path = Path("reports/removal-depth")
    """Where the table and the figure go."""


def measure(depth: int, threads: int) -> dict[str, float]:
    """One network in this process: seconds, residuals removed, errors in float64 and float32, peak memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = rmprune.models.create(f"resnet{depth}", num_classes=10)
    images = torch.randn(4, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 1.0)
            torch.nn.init.normal_(module.bias, std=0.2)
            module.momentum = None  # statistics of this pass, as training leaves them: outputs keep a sane scale
    with torch.no_grad():
        model.train()(images)
    model.eval()
    started = time.perf_counter()
    removal = rmprune.remove_residuals(model, images)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        single = {"original": model(images), "plain": removal.model(images)}
        exact = model.double()(images.double())
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    single["onnx"] = in_onnx_runtime(removal.model, images, threads)
    onnx_seconds = time.perf_counter() - started
    errors = {name: float((output - exact).abs().max() / exact.abs().max()) for name, output in single.items()}
    return {
        "depth": depth,
        "residuals_removed": len(removal.removed),
        "residuals_kept": len(removal.kept),
        "seconds": round(seconds, 2),
        "error_float64": removal.max_error,
        "error_float32": errors["plain"],
        "error_float32_original": errors["original"],  # what float32 does to the network as it was
        "error_onnxruntime": errors["onnx"],
        "macs_before": rmprune.count_macs(model, images[:1].double()),
        "macs_after": rmprune.count_macs(removal.model, images[:1]),
        "peak_gib": round(peak_gib, 2),
        "onnx_seconds": round(onnx_seconds, 2),  # export, session and one run
        "onnx_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "threads": threads,
    }


def in_onnx_runtime(plain: torch.nn.Module, images: torch.Tensor, threads: int) -> torch.Tensor:
    """Outputs of the plain network, exported and run in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        onnx_bytes(fold_batch_norms(plain), images), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def main(config: Config) -> None:
    console = Console()
    rows = []
    for depth in config.depths:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (depth, config.threads)))
        console.print(rows[-1])
    table = pd.DataFrame(rows)
    config.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(config.out / "depth.csv", index=False)
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(table.depth, table.seconds, marker="o", color="#0072B2")
    axes.set(xlabel="layers", ylabel="seconds", title="Removing all residuals of a CIFAR ResNet", xlim=0, ylim=0)
    axes.grid(alpha=0.3)
    figure.savefig(config.out / "depth.png", dpi=150)
    (config.out / "command.txt").write_text(shlex.join(["python", *sys.argv]) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
