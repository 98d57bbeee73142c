"""Images per second of our training loop against a plain one: `python experiments/throughput.py`.

Both train a ResNet-20 of width 32 on Fashion-MNIST with batches of 128. The plain loop is what a tutorial shows: float32,
contiguous memory, a DataLoader over single images with random crop and flip for each. Ours is `rmprune.training.fit`.
The two run in turns in one process; every turn gives one figure for each, after a warm-up.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rates import write_rates
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from rmprune.config import DataConfig, TrainConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.data.splits import TensorSplit
from rmprune.models.families import create
from rmprune.training import TrainState, fit


@dataclass(frozen=True)
class Settings:
    """What to time."""

    steps: int = 30
    """Steps of each loop in every turn."""
    warmup: int = 5
    """Steps of each loop before every turn, not timed."""
    rounds: int = 3
    """Turns."""
    threads: int = 2
    """Threads of PyTorch; the plain loop's DataLoader works in this process, as by default."""
    batch_size: int = 128
    """Images in a batch."""
    width: int = 32
    """Channels of the first stage."""
    workers: int = 0
    """Processes of the plain loop's DataLoader; 0: none but this one."""
    dataset: str = "fashion-mnist"
    """Images that are held in memory."""
    device: str = "cpu"
    """cpu or cuda."""
    data_dir: Path | None = None
    """Where Fashion-MNIST lies, if not where Debian puts it."""
    out: Path = Path("reports/throughput.csv")
    """The table."""


class Enough(Exception):
    """Raised by the hook after the last timed step."""


class AugmentedImages(TensorDataset):
    """Single images of a split, each cropped and flipped on its own."""

    def __init__(self, split: TensorSplit) -> None:
        super().__init__(split.images, split.labels)
        self.transform = v2.Compose(
            [
                v2.RandomCrop(split.images.shape[2:], padding=3),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.286], [0.353]),
            ]
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return self.transform(image), label


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_loop(data: Dataset, model: nn.Module, settings: Settings, device: torch.device) -> float:
    """Images per second of a plain float32 loop."""
    assert isinstance(data.train, TensorSplit)
    loader = DataLoader(
        AugmentedImages(data.train),
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    model.train()
    start = 0.0
    for step in range(settings.warmup + settings.steps):
        if step == settings.warmup:
            synchronise(device)
            start = time.perf_counter()
        x, y = (tensor.to(device) for tensor in next(batches))
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        loss.item()
    synchronise(device)
    return settings.steps * settings.batch_size / (time.perf_counter() - start)


def our_loop(data: Dataset, model: nn.Module, settings: Settings, device: torch.device) -> float:
    """Images per second of `fit` with its defaults."""
    times: list[float] = []

    def hook(state: TrainState) -> None:
        if state.step in (settings.warmup, settings.warmup + settings.steps):
            synchronise(device)
            times.append(time.perf_counter())
        if len(times) == 2:
            raise Enough

    with contextlib.suppress(Enough):
        fit(model, data, TrainConfig(learning_rate=0.01), seed=0, device=device, hook=hook, progress=False)
    return settings.steps * settings.batch_size / (times[1] - times[0])


LOOPS: dict[str, Callable[[Dataset, nn.Module, Settings, torch.device], float]] = {
    "plain": plain_loop,
    "rmprune": our_loop,
}


def rate(name: str, settings: Settings) -> float:
    """Images per second of one turn of a loop."""
    device = torch.device(settings.device)
    images = DataConfig(dataset=settings.dataset, data_dir=settings.data_dir, batch_size=settings.batch_size)
    data = load_dataset(images)
    model = create("resnet20", num_classes=data.num_classes, in_channels=data.input_shape[0], width=settings.width)
    return LOOPS[name](data, model.to(device), settings, device)


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    rates: dict[str, list[float]] = {name: [] for name in LOOPS}
    for turn in range(settings.rounds):
        for name in LOOPS:
            rates[name].append(rate(name, settings))
            print(f"turn {turn + 1}: {name} {rates[name][-1]:,.0f} images/s", flush=True)
    facts = {
        "model": f"resnet20 width {settings.width}",
        "dataset": settings.dataset,
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "rounds": settings.rounds,
    }
    write_rates(settings.out, "loop", "images_per_second", rates, settings.device, settings.threads, **facts)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
