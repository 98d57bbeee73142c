"""Networks, losses and batches of one's own, as `rmprune.slim` is given them: whole ones, and those that it refuses."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Angles(nn.Module):
    """A regression network with one residual, and a loss that reads batches of its own form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.body(x) + x).mean((2, 3)))


class Over(Angles):
    """A classifier that normalises its images itself, in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).div_(0.25))


class Viewed(nn.Module):
    """A classifier with one residual that reads its last map, of 4 x 4, as it lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.body(x) + x)
        return self.head(x.view(x.size(0), -1))


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if x.sum() > 0 else -x).mean((2, 3))


class Both(Asking):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(one + other).mean((2, 3))


def to_angles(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.smooth_l1_loss(model(batch["pixels"].float() / 255), batch["angles"])


def drawn(model: nn.Module, batch: Any) -> Tensor:
    return to_angles(model, batch) * (1 + torch.rand(()))


HOURS = iter(range(1, 1000))


def by_the_hour(model: nn.Module, batch: Any) -> Tensor:
    return to_angles(model, batch) * next(HOURS)


def classes(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def broken(model: nn.Module, batch: Any) -> Tensor:
    return torch.tensor(1.0)


def pixels(count: int = 3) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (8, 3, 8, 8), generator=draw, dtype=torch.uint8) for _ in range(count)]
    return [
        {"pixels": x, "angles": torch.stack([x.float().mean((1, 2, 3)) / 255, x[:, 0].float().mean((1, 2)) / 255], 1)}
        for x in images
    ]


def labelled(count: int = 3, classes: int = 4) -> list[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 8, 8, generator=draw), torch.arange(8) % classes, torch.zeros(8)) for _ in range(count)]


def once() -> Iterator[Any]:
    yield from labelled()


class Note:
    """A part of a batch that has no text of its own."""
