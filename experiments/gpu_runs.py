"""The runs whose accuracy `gpu.py` compares at equal measured time: their settings, in full and in miniature. Starts nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rmprune.config import AmcConfig, DataConfig, MeasureConfig, PruneConfig, SearchConfig, SlimConfig, TrainConfig
from rmprune.data import load
from rmprune.data.sources import READERS, Images, Source, read_fashion_mnist
from rmprune.methods.table import METHODS

SLIM = tuple(name for name in ("coupled", "rm", "mixed-auto", "auto") if name in METHODS)
"""Compared by `slim`; auto where there is such a method."""
AMC: dict[str, float | None] = {"mobilenet_v2": 0.5, "timm/efficientnet_lite0": None}
"""Networks of the comparisons by `amc`, with their width multipliers."""
LARGE, PIXELS = "fashion-mnist-64", 64
Run = tuple[str, int, SlimConfig | AmcConfig, float]


def planned(device: str, seeds: range, folder: Path | None, runs: Path, *, quick: bool) -> Iterator[Run]:
    """(comparison, seed, settings, seconds that it needs at least), the most telling first."""
    if quick:
        common = shared(device, DataConfig("digits", batch_size=64, train_images=200), epochs=1, tune=1, quick=True)
        slim = SlimConfig(
            model="resnet8",
            width=4,
            method=("coupled", "rm"),
            prune=PruneConfig(macs_ratio=(0.5,), round_to=1),
            out=runs / "slim-quick",
            **common,
        )
        search = SearchConfig(episodes=2, warm_up=1, images=64, calibration=64, importance="magnitude")
        yield "slim", 0, slim, 0.0
        yield (
            "amc",
            0,
            AmcConfig(width=0.5, method=("rm-amc", "residual-amc"), search=search, out=runs / "amc-quick", **common),
            0.0,
        )
        return
    offer_large()
    small = DataConfig("fashion-mnist", folder, 128, train_images=20000)
    prune = PruneConfig(latency_ratio=(0.6,), round_to=8)
    search = SearchConfig(
        budget=(0.6, 0.4), episodes=150, warm_up=40, images=2000, calibration=512, importance="magnitude"
    )
    first, *others = AMC
    for names in ([first], others):
        for seed in seeds:
            if names == [first]:
                out = runs / f"slim-{seed}"
                common = shared(device, small, epochs=8, tune=4, quick=False)
                slim = SlimConfig(
                    model="resnet20",
                    width=32,
                    method=SLIM,
                    prune=prune,
                    seed=seed,
                    out=out,
                    skip_infeasible=True,
                    **common,
                )
                yield "slim", seed, slim, 25.0
            for name in names:
                out = runs / f"amc-{name.replace('/', '-')}-{seed}"
                large = DataConfig(LARGE, folder, 128, train_images=20000)
                common = shared(device, large, epochs=8, tune=4, quick=False)
                methods = ("rm-amc", "residual-amc")
                amc = AmcConfig(
                    model=name, width=AMC[name], method=methods, search=search, seed=seed, out=out, **common
                )
                yield f"amc {name}", seed, amc, 40.0


def shared(device: str, data: DataConfig, *, epochs: int, tune: int, quick: bool) -> dict[str, Any]:
    """What both commands are told. Time counts in CUDA graphs in float16, 256 images at a time."""
    backend, batch = ("eager", 1) if quick else ("cudagraph-float16", 256)
    seconds, rounds = (0.02, 3) if quick else (0.2, 9)
    return {
        "device": device,
        "data": data,
        "train": TrainConfig(epochs=epochs, learning_rate=0.2),
        "finetune": TrainConfig(epochs=tune, learning_rate=0.05, warmup_epochs=0.0, distillation=0.5),
        "measure": MeasureConfig((backend,), (torch.get_num_threads(),), (batch,), device, seconds, rounds),
        "overwrite": True,
    }


def offer_large() -> None:
    """Fashion-MNIST enlarged to PIXELS, among the data sets of this process."""
    READERS[LARGE] = read_large
    load.DATASETS = (*READERS, "imagefolder")


def read_large(folder: Path | None) -> Source:
    """Every image bilinearly enlarged."""
    source = read_fashion_mnist(folder)
    return source._replace(train=larger(source.train), test=larger(source.test))


def larger(data: Images) -> Images:
    """The same, PIXELS high and wide."""
    parts = [
        F.interpolate(part.float(), size=PIXELS, mode="bilinear").round().to(torch.uint8)
        for part in data.images.split(4096)
    ]
    return Images(torch.cat(parts), data.labels)
