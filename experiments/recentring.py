"""What the first epoch of fine-tuning does to a network that was cut once and fitted, with and without batch norms re-centred.

    python -m rmprune train --model resnet20 --dataset fashion-mnist --batch-size 128 --train-images 20000 --epochs 5
    python experiments/recentring.py runs/train-resnet20-fashion-mnist/dense      # writes reports/recentring

Residuals are removed, the network is cut once by Taylor to each part of its MACs, every layer fitted by least squares, then fine-tuned
for an epoch with the original as teacher. eval_mode, training_mode: the loss of the fitted network on training images, in training mode
with the statistics of each batch, which is what the first step computes. Accuracies are of the validation images; `remeasured`: the
same weights, the statistics of batch norms taken anew. The test images are never read.
"""

import copy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from rmprune import Budget, load, prune, remove_residuals
from rmprune.config import DataConfig, TrainConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.measure import count_macs
from rmprune.training import evaluate, fit
from rmprune.training.recentre import recentre

IMAGES = 2048  # training images that importance, fits and statistics are measured on


@dataclass(frozen=True)
class Settings:
    """The study of re-centring."""

    dense: tyro.conf.Positional[Path]
    """Artifact of a trained network."""
    dataset: str = "fashion-mnist"
    """What it was trained on."""
    train_images: int = 20_000
    """A fixed part of the training images."""
    macs_ratio: tuple[float, ...] = (0.3, 0.15)
    """Budgets, of the MACs of the network."""
    learning_rate: tuple[float, ...] = (0.02, 0.005)
    """Peak learning rates of fine-tuning, which fall to 0 over its epoch."""
    seeds: int = 2
    """Orders of the images."""
    out: Path = Path("reports/recentring")
    """Where the table goes."""


def mode_losses(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Mean loss on training images in eval mode and in training mode; no weight and no statistic moves."""
    found = {}
    for name, training in (("eval_mode", False), ("training_mode", True)):
        network = copy.deepcopy(model).train(training)
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 0.0
        with torch.no_grad():
            batches = data.train.batches(128, shuffle_seed=1, limit=IMAGES)
            found[name] = float(torch.stack([nn.functional.cross_entropy(network(x), y) for x, y in batches]).mean())
    return found


def remeasured(model: nn.Module, images: list[Tensor]) -> nn.Module:
    """The same weights, statistics of batch norms measured anew in training mode."""
    network = copy.deepcopy(model)
    update_bn(images, network)
    return network.eval()


def rows(settings: Settings) -> list[dict[str, Any]]:
    """One for each budget, form, rate and seed."""
    data = load_dataset(DataConfig(settings.dataset, batch_size=128, train_images=settings.train_images))
    dense, found = load(settings.dense), []
    batches = list(data.train.batches(128, limit=IMAGES))
    images, example = [x for x, _ in batches], data.train.example(2)
    plain, whole = remove_residuals(dense, images[0]).model, count_macs(dense, example[:1])
    for ratio in settings.macs_ratio:
        budget = Budget(macs_ratio=ratio, reference_macs=whole, min_fraction=0.1)
        fitted = prune(plain, example, importance="taylor", budget=budget, data=batches, reconstruct=True)
        for form, network in (("as fitted", fitted), ("re-centred", recentre(fitted, images))):
            before = {**mode_losses(network, data), "fitted": evaluate(network, data.validation).accuracy}
            for rate in settings.learning_rate:
                for seed in range(settings.seeds):
                    tuning = TrainConfig(1, rate, warmup_epochs=0.0, distillation=0.5)
                    tuned = fit(network, data, tuning, seed=seed, teacher=dense, progress=False)
                    after = {
                        "tuned": evaluate(tuned, data.validation).accuracy,
                        "remeasured": evaluate(remeasured(tuned, images), data.validation).accuracy,
                    }
                    facts = {"macs_ratio": ratio, "form": form, "learning_rate": rate, "seed": seed}
                    found.append(facts | {name: round(value, 4) for name, value in (before | after).items()})
                    print(found[-1], flush=True)
    return found


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows(settings)).to_csv(settings.out / "results.csv", index=False)
    (settings.out / "command.txt").write_text("python " + shlex.join(sys.argv) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
