"""What int8 does to a network, to its forms without residuals, and to a pruned one: accuracy and time in each number format.

    python experiments/int8.py --models resnet20 resnet18 mobilenet_v2 timm/efficientnet_lite0 --dataset fashion-mnist --data-dir DIR

Each network is trained once; `plain-FORM` is the exact removal with copies passed in that form (shift, pair, slice: with ranges of their
own, so int8 may tell them apart), `pruned` the form `auto` cut to half its channels and trained on. Accuracy is of the test images, as the
backend computes it. Writes results.csv (after each network) and command.txt under --out.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from torch import nn

import rmprune
from rmprune.config import DataConfig, TrainConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.errors import RmpruneError
from rmprune.measure import calibration_images, measure_latencies
from rmprune.measure.machine import environment
from rmprune.training import evaluate, fit


@dataclass(frozen=True)
class Settings:
    models: tuple[str, ...] = ("resnet20",)
    width: int | None = None
    """For networks that have one."""
    dataset: str = "digits"
    data_dir: Path | None = None
    train_images: int | None = None
    epochs: int = 20
    finetune_epochs: int = 10
    seed: int = 0
    forms: tuple[str, ...] = ("auto", "shift", "pair", "slice")
    backends: tuple[str, ...] = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8")
    threads: int = 2
    batch_size: int = 1
    seconds: float = 2.0
    out: Path = Path("reports/int8")


def networks(name: str, data: Dataset, settings: Settings) -> dict[str, nn.Module]:
    """The trained network and what is made of it; a form that it does not take is left out, and said."""
    torch.manual_seed(settings.seed)
    width = {} if settings.width is None else {"width": settings.width}
    net = rmprune.models.create(name, num_classes=data.num_classes, in_channels=data.input_shape[0], **width)
    net = fit(
        net, data, TrainConfig(epochs=settings.epochs), seed=settings.seed, device=torch.device("cpu"), progress=False
    )
    x, found = data.train.example(16), {"residual": net.eval()}
    for form in settings.forms:
        try:
            found[f"plain-{form}"] = rmprune.remove_residuals(net, x, form=form).model
        except RmpruneError as reason:
            print(f"{name}, {form}: {reason}")
    pruned = rmprune.prune(rmprune.remove_residuals(net, x, batch_norm=True).model, x, budget=rmprune.Budget(ratio=0.5))
    tuning = TrainConfig(epochs=settings.finetune_epochs, learning_rate=0.02, warmup_epochs=0.0)
    pruned = fit(pruned, data, tuning, seed=settings.seed, device=torch.device("cpu"), progress=False)
    return found | {"pruned": pruned.eval()}


def rows_of(name: str, data: Dataset, settings: Settings) -> list[dict[str, Any]]:
    found = networks(name, data, settings)
    times = measure_latencies(
        found,
        data.test.example(1),
        backends=settings.backends,
        threads=[settings.threads],
        batch_sizes=[settings.batch_size],
        seconds=settings.seconds,
        reference="residual",
        calibration=calibration_images(data.train),
        split=data.test,
    )
    exact = {key: evaluate(model, data.test).accuracy for key, model in found.items()}
    return [
        {
            "model": name,
            "network": key,
            "macs": rmprune.count_macs(found[key], data.test.example(1)),
            "float32_accuracy": exact[key],
            **latency.to_dict(),
            "accuracy": exact[key] if latency.accuracy is None else latency.accuracy,
            "lost": 0.0 if latency.accuracy is None else exact[key] - latency.accuracy,
        }
        for key, latencies in times.items()
        for latency in latencies
    ]


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    (settings.out / "command.txt").write_text(f"{command}\n{environment()}\n")
    data = load_dataset(
        DataConfig(dataset=settings.dataset, data_dir=settings.data_dir, train_images=settings.train_images)
    )
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(settings.models):
        print(f"{name}: {number + 1} of {len(settings.models)}", flush=True)
        rows += rows_of(name, data, settings)
        table = pd.DataFrame(rows)
        table.to_csv(settings.out / "results.csv", index=False)
    shown = table[["model", "network", "backend", "float32_accuracy", "accuracy", "lost", "median_ms", "ratio"]]
    print(shown.round(4).to_string(index=False))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
