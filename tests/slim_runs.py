"""Runs in miniature, of networks of few layers that go by names of their own, with times made up where they are the budget."""

from dataclasses import replace

import torch

import rmprune
from rmprune.config import DataConfig, MeasureConfig, PruneConfig, SlimConfig, TrainConfig
from rmprune.data.load import Dataset
from rmprune.data.sources import Images
from rmprune.data.splits import TensorSplit
from rmprune.measure.place import Place
from rmprune.models.families import FAMILIES, Family
from rmprune.models.mobilenet import mobilenet_v2
from rmprune.models.resnet import CifarResNet


def short_resnet(_: str, *, num_classes: int, in_channels: int, width: int) -> torch.nn.Module:
    """ResNet-8 without its last stage: a block whose shortcut is the identity, and one whose shortcut is a convolution."""
    model = CifarResNet(1, in_channels=in_channels, width=width)
    model.layer3, model.fc = torch.nn.Sequential(), torch.nn.Linear(2 * width, num_classes)
    return model


def short_mobilenet(
    _: str, *, num_classes: int, in_channels: int, width: float = 1.0, free: int = 1
) -> torch.nn.Module:
    """Four inverted blocks, two of them residual."""
    settings = {"stages": ((1, 16, 1), (4, 24, 3)), "strides": (1, 1, 2), "last_channels": 32}
    return mobilenet_v2(num_classes=num_classes, in_channels=in_channels, width=width, free=free, **settings)  # type: ignore[arg-type]


FAMILIES |= {"short_resnet": Family(short_resnet, ()), "short_mobilenet": Family(short_mobilenet, ())}
QUICK = SlimConfig(
    model="short_resnet",
    width=4,
    method=("rm", "coupled"),
    data=DataConfig(train_images=256),
    train=TrainConfig(epochs=2),
    finetune=TrainConfig(epochs=2, learning_rate=0.02),
    prune=PruneConfig(macs_ratio=(0.5,), cuts=4, round_to=1),
    measure=MeasureConfig(backends=("eager",), threads=(1,), batch_sizes=(1,), seconds=0.0, min_rounds=3),
)
ON_BOTH_BACKENDS = replace(QUICK, measure=replace(QUICK.measure, backends=("onnxruntime", "eager")))


def by_parameters(place: Place, networks: dict[str, torch.nn.Module]) -> dict[str, float]:
    whole = rmprune.measure.count_params(place.original)
    return {name: rmprune.measure.count_params(network) / whole for name, network in networks.items()}


def noise() -> Dataset:
    split = TensorSplit(
        Images(torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40) % 10),
        torch.full((3,), 128.0),
        torch.full((3,), 64.0),
        may_flip=False,
    )
    return Dataset("noise", 10, (3, 32, 32), split, split, split, QUICK.data)


class Small(torch.nn.Module):
    """A hidden linear layer without a batch norm; `branching` on data, which torch.fx cannot trace."""

    def __init__(self, branching: bool) -> None:
        super().__init__()
        self.branching = branching
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        )  # fmt: skip
        self.hidden, self.head = torch.nn.Linear(16, 24), torch.nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.branching and x.sum() > 1e9:
            return torch.zeros(len(x), 10)
        return self.head(torch.relu(self.hidden(self.features(x))))


class Inverted(torch.nn.Module):
    """x + its inverted residual branch, three times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inside = 3 * width
        self.branch = torch.nn.Sequential(
            torch.nn.Conv2d(width, inside, 1, bias=False), torch.nn.BatchNorm2d(inside), torch.nn.ReLU6(),
            torch.nn.Conv2d(inside, inside, 3, padding=1, groups=inside, bias=False), torch.nn.BatchNorm2d(inside), torch.nn.ReLU6(),
            torch.nn.Conv2d(inside, width, 1, bias=False), torch.nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


def inverted() -> torch.nn.Module:
    """Two inverted residuals, for the digits."""
    stem = (torch.nn.Conv2d(1, 8, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU6())
    head = (torch.nn.Conv2d(8, 16, 1), torch.nn.ReLU6(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return torch.nn.Sequential(*stem, Inverted(8), Inverted(8), *head, torch.nn.Linear(16, 10)).eval()


def convolutions(model: torch.nn.Module) -> int:
    return sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
