"""The runs whose accuracy `gpu.py` compares at equal measured time: their settings, in full and in miniature. Starts nothing.

A comparison is a network on a data set. With each seed the network is trained once, by `slim`, which cuts it by its methods; `amc` then
starts from that checkpoint. Budgets count MACs, in which a search costs the lent machine nothing, and times are measured: methods are
compared at equal time along the rivals' front (`gpu_report.over_front`). Or they count measured time on the device (`Budgets`).
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from rmprune.config import (
    AmcConfig,
    DataConfig,
    MeasureConfig,
    PruneConfig,
    SearchConfig,
    SlimConfig,
    SparsityConfig,
    TrainConfig,
)
from rmprune.data import load
from rmprune.data.sources import READERS, Images, Source, read_digits, read_fashion_mnist
from rmprune.pipelines.stages import make_dense, open_data
from rmprune.runs.cells import plan_cells

LARGE, PIXELS = "fashion-mnist-64", 64
SOLAR_PIXELS = 128
SPLITS = 5  # of the solar cells, one for each seed: as many as experiments/solar-cells/layout.py writes
Budgets = Literal["macs", "time"]
LITE = "timm/efficientnet_lite0"
LITE_WEIGHTS: dict[str, Any] = {"weights_by_order": True, "batch_norm_eps": 1e-3}


@dataclass(frozen=True)
class Comparison:
    """`slim`'s methods at `keep` of the MACs, `amc`'s at `budget`, or all at `time`; `seconds`: that a run may need, as assumed."""

    model: str
    data: DataConfig
    train: TrainConfig
    tune: TrainConfig
    slim: tuple[str, ...]
    keep: tuple[float, ...]
    amc: tuple[str, ...] = ()
    budget: tuple[float, ...] = ()
    time: tuple[float, ...] = (0.6,)
    sparsity: float = 0.8
    width: int | None = None
    pretrained: bool = False
    seconds: float = 60.0
    episodes: int = 100

    @property
    def name(self) -> str:
        return f"{self.model.removeprefix('timm/')}, {self.data.dataset}"


class Run(NamedTuple):
    """One run of `slim` or `amc`, and the seconds that it needs at least."""

    comparison: str
    seed: int
    config: SlimConfig | AmcConfig
    seconds: float


def tuned(epochs: int, rate: float) -> TrainConfig:
    return TrainConfig(epochs=epochs, learning_rate=rate, warmup_epochs=0.0, distillation=0.5)


def comparisons(part: str, folder: Path | None, *, quick: bool) -> tuple[Comparison, ...]:
    """Those of a part, the most telling first; `folder`: where its data lie."""
    slim, amc = ("coupled", "rm", "auto"), ("rm-amc", "residual-amc")
    view: dict[str, Any] = {"image_size": SOLAR_PIXELS, "crop": 1.0, "normalization": "half", "augment": "mirrors"}
    solar = DataConfig("imagefolder", folder, 32, validation=0.2, **view)
    small = DataConfig("fashion-mnist", folder, 256, train_images=20000)
    if quick:
        once, brief = TrainConfig(epochs=1), tuned(1, 0.05)
        digits = DataConfig("digits", batch_size=64, train_images=200)
        photos = dataclasses.replace(solar, image_size=16)
        return {
            "accuracy": (
                Comparison("resnet8", digits, once, brief, slim[::2], (0.5,), amc, (0.6,), width=4, episodes=2),
            ),
            "solar": (Comparison("resnet8", photos, once, brief, slim[:1], (0.5,), width=4),),
        }[part]
    return {
        "accuracy": (
            Comparison(
                "resnet20", small, TrainConfig(epochs=8, learning_rate=0.2), tuned(4, 0.1), slim, (0.3, 0.15), width=32
            ),
            Comparison(
                "mobilenet_v2",
                dataclasses.replace(small, dataset=LARGE, batch_size=128),
                TrainConfig(epochs=8, learning_rate=0.2),
                tuned(4, 0.05),
                slim,
                (0.7, 0.5),
                amc,
                (0.8, 0.5, 0.35),
            ),
        ),
        "solar": (
            Comparison(
                LITE,
                solar,
                TrainConfig(epochs=15, learning_rate=0.01, head_rate=5.0),
                tuned(8, 0.01),
                ("coupled-taylor", "rm", "auto"),
                (0.7, 0.5),
                amc,
                (0.8, 0.5, 0.35),
                sparsity=0.2,
                pretrained=True,
            ),
            Comparison(
                "mobilenet_v2",
                solar,
                TrainConfig(epochs=40, learning_rate=0.05),
                tuned(8, 0.01),
                slim,
                (0.7, 0.5),
                amc,
                (0.8, 0.5, 0.35),
                sparsity=0.4,
            ),
        ),
    }[part]


def planned(
    part: str,
    names: Sequence[str],
    seeds: range,
    device: str,
    folder: Path | None,
    runs: Path,
    *,
    quick: bool,
    budgets: Budgets = "macs",
) -> Iterator[Run]:
    """The runs of a part, comparison by comparison and seed by seed; `names`: of networks, those comparisons alone."""
    offer_large()
    if quick and part == "solar":
        folder = write_photos(runs / "photos")
    for comparison in comparisons(part, folder, quick=quick):
        if names and comparison.model not in names:
            continue
        for seed in seeds:
            yield from runs_of(comparison, seed, device, runs / part, quick=quick, timed=budgets == "time")


def runs_of(own: Comparison, seed: int, device: str, runs: Path, *, quick: bool, timed: bool) -> Iterator[Run]:
    """`slim`'s run, and `amc`'s on the network that it trained."""
    data, folder = own.data, runs / f"{own.model.replace('/', '-')}-{seed}{'-time' * timed}"
    name = own.name + ", budgets in time" * timed
    if data.dataset == "imagefolder":
        data = dataclasses.replace(data, labels=Path(f"split{seed % SPLITS}.csv"), cache="memory")
    common: dict[str, Any] = {
        "model": own.model,
        "width": own.width,
        "seed": seed,
        "device": device,
        "data": data,
        "train": own.train,
        "finetune": own.tune,
        "measure": measure(device, quick=quick),
        "overwrite": True,
        **({"batch_norm_eps": LITE_WEIGHTS["batch_norm_eps"]} if own.pretrained else {}),
    }
    starts: dict[str, Any] = {}
    if own.pretrained:
        assert data.data_dir is not None
        starts = LITE_WEIGHTS | {"weights": str(data.data_dir / "efficientnet-lite0.pth")}
    slim = SlimConfig(
        method=own.slim,
        prune=PruneConfig(
            macs_ratio=() if timed else own.keep, latency_ratio=own.time if timed else (), round_to=2 if quick else 8
        ),
        sparsity=SparsityConfig(strength=own.sparsity),
        search_minutes=0.0 if quick else 0.1,
        skip_infeasible=True,
        out=folder / "slim",
        **common | starts,
    )
    yield Run(name, seed, slim, own.seconds)
    if own.amc:
        search = SearchConfig(
            constraint="latency" if timed else "macs",
            budget=own.time if timed else own.budget,
            episodes=own.episodes,
            warm_up=min(30, own.episodes // 2),
            images=64 if quick else 2000,
            calibration=64 if quick else 512,
            importance="magnitude",
            multiple=2 if quick else 8,
        )
        dense = plan_cells(slim.directory, seed, 1, slim.prune.budgets)[0].shared / "dense"
        yield Run(
            name,
            seed,
            AmcConfig(method=own.amc, search=search, checkpoint=dense, out=folder / "amc", **common),
            own.seconds,
        )


def measure(device: str, *, quick: bool) -> MeasureConfig:
    """Where time counts: CUDA graphs in float16, 256 images at a time."""
    backend, batch = ("eager", 1) if quick else ("cudagraph-float16", 256)
    return MeasureConfig((backend,), (torch.get_num_threads(),), (batch,), device, *((0.02, 3) if quick else (0.2, 9)))


def rows(records: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The networks of finished runs, one row each."""
    for path in records:
        record = json.loads(path.read_text())
        whole = record["original"]
        for method, found in record.items():
            if isinstance(found, dict) and "latency" in found:
                latency = found["latency"][0]
                yield {
                    "network": record["model"],
                    "method": found.get("method", method),
                    "chosen": found.get("chosen", ""),
                    "accuracy": found["accuracy"],
                    "auc": found.get("auc"),
                    "time_ratio": latency["ratio"],
                    "images_per_second": latency["batch_size"] / latency["median_ms"] * 1e3,
                    "macs_ratio": found["macs"] / whole["macs"],
                    "backend": latency["backend"],
                    "batch_size": latency["batch_size"],
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


def write_photos(folder: Path) -> Path:
    """Digits as photos of two classes, laid out as the solar cells are: for the miniature. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = read_digits(None).train
    with (folder / "split0.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "label", "split"))
        for number in range(120):
            Image.fromarray(digits.images[number, 0].numpy()).resize((16, 16)).save(folder / f"{number}.png")
            table.writerow((f"{number}.png", int(digits.labels[number]) % 2, "test" if number % 4 == 0 else "train"))
    return folder


def check(kit: str, folder: Path) -> None:
    """What a kit brought is read, and every run of its full size is asked for what it is: nothing is trained."""
    part, data = {"fashion": ("accuracy", "fashion-mnist"), "solar": ("solar", "cells")}[kit]
    networks = set()
    for run in planned(part, (), range(SPLITS), "cpu", folder / data, Path("runs"), quick=False):
        if run.config.command == "slim":
            found = open_data(run.config)
            network = make_dense(run.config, found, run.seed)
            networks.add(run.comparison)
            print(
                run.comparison,
                run.seed,
                tuple(network(found.train.example(2)).shape),
                len(found.train),
                len(found.test),
            )
    print(f"{kit}: {', '.join(sorted(networks))}")


if __name__ == "__main__":
    check(sys.argv[1], Path(sys.argv[2]))
