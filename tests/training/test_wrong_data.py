"""Data that cannot be trained or evaluated on: one DataError, never an endless loop or torch's own words."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rmprune.config import DataConfig, TrainConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.data.splits import Images, TensorSplit
from rmprune.errors import DataError
from rmprune.training import evaluate, fit

NET = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()


def dataset(labels: list[int]) -> Dataset:
    images = Images(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64))
    split = TensorSplit(images, torch.zeros(1), torch.ones(1), may_flip=False)
    return replace(load_dataset(DataConfig()), train=split, validation=split, config=DataConfig(batch_size=4))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([], "gave 0 batches where they said 1"),
        ([0, 1, 2, 7], "from 0 to 7, but .* 4 classes"),
        ([0, 1, 2, -100], "from -100"),
    ],
)
def test_is_refused(labels: list[int], reason: str) -> None:
    data = dataset(labels)
    with pytest.raises(DataError, match=reason):
        fit(NET, data, TrainConfig(epochs=1, channels_last=False), seed=0, progress=False)
    with pytest.raises(DataError, match=reason if labels else "no images"):
        evaluate(NET, data.validation)


def test_no_images_no_example() -> None:
    with pytest.raises(DataError, match="hold no images"):
        dataset([]).train.example(1)
    with pytest.raises(DataError, match="hold no images"):
        fit(NET, dataset([]), TrainConfig(epochs=1), seed=0, progress=False)
    with pytest.raises(DataError, match="no images"):
        evaluate(NET, dataset([0]).train, limit=0)
