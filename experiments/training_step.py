"""Images per second of a training step (forward and backward, channels last, random images) in float32, in bfloat16 as
torch.autocast has it, and as rmprune trains (`rmprune.training.precision.autocast`), in turns in one process:

    python experiments/training_step.py
    python experiments/training_step.py --model mobilenet_v2 --image-size 64

On CPUs torch.autocast alone computes depthwise layers in bfloat16, for whose gradients oneDNN has fast kernels only where they
look at 3x3 pixels or fewer without a stride.
"""

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rates import write_rates
from torch.nn.functional import cross_entropy

from rmprune.models import create
from rmprune.training.precision import autocast

CPU = torch.device("cpu")
WAYS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float32": contextlib.nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "rmprune": lambda: autocast("bfloat16", CPU),
}


@dataclass(frozen=True)
class Settings:
    """What to time."""

    model: str = "timm/efficientnet_lite0"
    """Network by name."""
    image_size: int = 128
    """Height and width of the images."""
    batch_size: int = 32
    """Images in a batch."""
    steps: int = 3
    """Steps of each way in every turn, after one that is not timed."""
    rounds: int = 5
    """Turns."""
    threads: int = 1
    """Threads of PyTorch."""
    out: Path = Path("reports/training-step.csv")
    """The table."""


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    model = create(settings.model, num_classes=10).train().to(memory_format=torch.channels_last)
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    x, y = torch.randn(shape).to(memory_format=torch.channels_last), torch.randint(10, shape[:1])
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(settings.rounds):
        for name, way in WAYS.items():
            for step in range(settings.steps + 1):
                if step == 1:
                    started = time.perf_counter()
                model.zero_grad()
                with way():
                    loss = cross_entropy(model(x).float(), y)
                loss.backward()
            rates[name].append(settings.steps * len(x) / (time.perf_counter() - started))
    facts = {key: getattr(settings, key) for key in ("model", "image_size", "batch_size", "steps", "rounds")}
    precision = {name: "float32" if name == "float32" else "bfloat16" for name in WAYS}
    write_rates(settings.out, "way", "images_per_second", rates, "cpu", settings.threads, precision=precision, **facts)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
