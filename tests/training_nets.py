"""A small problem to train on, a small network, and a hook that interrupts."""

import json
import signal
from pathlib import Path

import torch
from torch import nn

from rmprune.config import DataConfig, TrainConfig
from rmprune.data.load import Dataset
from rmprune.data.sources import Images
from rmprune.data.splits import TensorSplit
from rmprune.training import TrainState, fit

CONFIG = TrainConfig(epochs=3, warmup_epochs=0.5, precision="float32")


def blobs(config: DataConfig | None = None) -> Dataset:
    """Two classes of 8x8 images, bright above or bright below: easy to tell apart, with noise."""
    config = config or DataConfig(batch_size=16)

    def split(count: int, seed: int) -> TensorSplit:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 2
        images = torch.randint(0, 120, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
        images[labels == 0, :, :4] += 100
        images[labels == 1, :, 4:] += 100
        return TensorSplit(Images(images, labels), torch.tensor([110.0]), torch.tensor([60.0]), may_flip=False)

    return Dataset("blobs", 2, (1, 8, 8), split(88, 0), split(40, 1), split(40, 2), config)


def tiny_net(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),  # draws from the global generator: exact resumption must restore it
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


class Viewed(nn.Module):
    """`tiny_net` with a view of its last map instead of Flatten, which fails where channels lie last."""

    def __init__(self) -> None:
        super().__init__()
        *layers, _, self.head = tiny_net(0.0)
        self.body = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.head(x.view(x.size(0), -1))


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def records(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


class Stop:
    """A hook that interrupts after so many steps, and passes on to another hook before."""

    def __init__(self, after: int, inner: object = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.after, self.inner, self.error = after, inner, error

    def __call__(self, state: TrainState) -> None:
        if self.inner:
            self.inner(state)  # type: ignore[operator]
        if state.step == self.after:
            if self.error is not KeyboardInterrupt:
                raise self.error
            signal.raise_signal(signal.SIGINT)  # waits for the end of the step


def fit_without_batch_norms(out: Path) -> nn.Module:
    """Batch norms see their own process's images only, so with them two processes are not one."""
    model = nn.Sequential(*[module for module in tiny_net(0.0) if not isinstance(module, nn.BatchNorm2d)])
    config = TrainConfig(epochs=2, precision="float32", learning_rate=0.02)
    return fit(model, blobs(), config, seed=0, log=out / "log.jsonl", checkpoint=out / "c.pt")
