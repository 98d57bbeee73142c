"""Episodes per minute of our AMC search against a straightforward one: `python experiments/amc_throughput.py`.

Both search the widths of MobileNetV2 on Fashion-MNIST after RM, with the same agent, budget and validation images. The
straightforward one scores a policy as the public codes do: copy the model, set the channels that go to zero, evaluate in
float32 (it does not even recalibrate batch norms, which ours does for every policy). They run in turns in one process.
Weights are untrained: what is timed does not depend on them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rates import write_rates
from torch import Tensor, nn

from rmprune.amc.agent import AgentConfig
from rmprune.amc.choose import first_images, make_scorer, make_space
from rmprune.amc.environment import Environment
from rmprune.amc.search import Search
from rmprune.amc.space import Space, Widths
from rmprune.config import AmcConfig, DataConfig, SearchConfig
from rmprune.data.load import load_dataset
from rmprune.models.families import create
from rmprune.removal import remove_residuals
from rmprune.training.job import Job


@dataclass(frozen=True)
class Settings:
    """What to time."""

    episodes: int = 4
    """Episodes of each search in every turn."""
    rounds: int = 3
    """Turns."""
    images: int = 2000
    """Validation images that a policy is scored on."""
    width: float = 0.5
    """Width multiplier of MobileNetV2."""
    budget: float = 0.5
    """Fraction of the original network's MACs that may stay."""
    batch_size: int = 128
    """Images in a batch of the straightforward search."""
    threads: int = 2
    """Threads of PyTorch."""
    device: str = "cpu"
    """cpu or cuda."""
    data_dir: Path | None = None
    """Where Fashion-MNIST lies, if not where Debian puts it."""
    out: Path = Path("reports/amc-throughput.csv")
    """The table."""


class Straightforward:
    """Scores a policy by a masked copy of the model in float32."""

    def __init__(
        self, model: nn.Module, space: Space, order: dict[str, Tensor], images: Tensor, labels: Tensor, batch_size: int
    ) -> None:
        self.model, self.space, self.order, self.batch_size = model, space, order, batch_size
        self.images, self.labels = images, labels

    @torch.no_grad()
    def accuracy(self, widths: Widths) -> float:
        model = copy.deepcopy(self.model).eval()
        keep = self.space.keep(widths, self.order)
        for group in self.space.groups:
            gone = ~keep[group.name]
            for member in group.members:
                if member.side != "in":
                    layer, index = model.get_submodule(member.layer), member.index[gone].flatten()
                    for parameter in layer.parameters(recurse=False):
                        parameter[index] = 0
        chosen = [model(batch).argmax(1) for batch in self.images.split(self.batch_size)]
        return float((torch.cat(chosen) == self.labels).double().mean())


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    device = torch.device(settings.device)
    data = load_dataset(DataConfig(dataset="fashion-mnist", data_dir=settings.data_dir))
    example = data.train.example(64)
    original = create("mobilenet_v2_small", num_classes=10, in_channels=1, width=settings.width).eval()
    plain = remove_residuals(original, example, fuse="always", tolerance=1e-6).model
    config = SearchConfig(images=settings.images, importance="magnitude")
    space = make_space(plain, original, example[:2], config, settings.budget)
    ours = make_scorer(plain, space, Job(AmcConfig(search=config), data, device, 0))
    images, labels = first_images(data.validation, settings.images, device)
    theirs = Straightforward(plain.to(device), space, ours.order, images, labels, settings.batch_size)
    scorers: dict[str, Callable[[Widths], float]] = {"straightforward": theirs.accuracy, "rmprune": ours.accuracy}
    agent = AgentConfig(warm_up=0)
    searches = {
        name: Search(Environment(space, score), episodes=10**6, seed=0, agent=agent) for name, score in scorers.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in searches}
    for turn in range(-1, settings.rounds):  # the first turn warms up
        for name, search in searches.items():
            search.total = len(search.result.episodes) + (1 if turn < 0 else settings.episodes)
            start = time.perf_counter()
            search.run()
            if turn >= 0:
                rates[name].append(60 * settings.episodes / (time.perf_counter() - start))
                print(f"turn {turn + 1}: {name} {rates[name][-1]:,.1f} episodes/min", flush=True)
    facts = {
        "recalibrated": {"straightforward": False, "rmprune": True},
        "model": f"mobilenet_v2_small width {settings.width:g}, RM, fused",
        "layers": len(space.groups),
        "macs_budget": settings.budget,
        "images": settings.images,
        "episodes": settings.episodes,
        "rounds": settings.rounds,
    }
    write_rates(settings.out, "search", "episodes_per_minute", rates, settings.device, settings.threads, **facts)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
