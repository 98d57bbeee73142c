"""`Split.example(n)` costs what n images cost, whatever the split holds."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rmprune.config import DataConfig
from rmprune.data import folder
from rmprune.data.folder import FolderSplit
from rmprune.data.photos import Photos
from rmprune.data.sources import Images
from rmprune.data.splits import IMAGENET_STATISTICS, TensorSplit

COUNT = 100_000


class Paths(list[str]):
    """A long list of paths, all of one file, that counts how many were looked at."""

    looked_at = 0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        self.looked_at += 1
        return str(self.path)

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(COUNT))


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    return Paths(tmp_path / "0.png")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were made, one for each image of a plan."""
    made: list[int] = []
    seed = folder.batch_seed
    monkeypatch.setattr(folder, "batch_seed", lambda *given: made.append(given[1]) or seed(*given))
    return made


def split_of(paths: Paths, workers: int = 0) -> FolderSplit:
    config = DataConfig(dataset="imagefolder", image_size=8, workers=workers)
    return FolderSplit(Photos(paths, 9, 8), torch.arange(COUNT), torch.arange(COUNT) % 7, config, IMAGENET_STATISTICS)


def test_an_example_of_a_folder_plans_and_reads_its_images_alone(paths: Paths, planned: list[int]) -> None:
    x = split_of(paths).example(2)
    assert x.shape == (2, 3, 8, 8) and torch.equal(x[0], x[1])
    assert paths.looked_at == 2 == len(planned)


def test_an_example_of_a_folder_starts_no_process(paths: Paths) -> None:
    split_of(paths, workers=2).example(2)
    assert paths.looked_at == 2  # in this process: a worker would count in its own copy


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_a_pass_over_a_folder_is_planned_as_it_goes(paths: Paths, planned: list[int], shuffle_seed: int | None) -> None:
    batches = split_of(paths).batches(4, shuffle_seed=shuffle_seed)
    for number in range(1, 3):
        next(batches)
        assert paths.looked_at == 4 * number and len(planned) <= 4 * (number + 1)


def test_an_example_moves_no_whole_split_to_a_device() -> None:
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    split = TensorSplit(Images(images, torch.arange(20)), torch.zeros(1), torch.ones(1), may_flip=False)
    assert split.example(3, device="meta").device.type == "meta"
    assert split._held is None
    assert torch.equal(split.example(3), images[:3].float())
    assert len(split.example(50)) == 20
