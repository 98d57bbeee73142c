"""`Split.example(n)` costs what n images cost, whatever the split holds."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rmprune.config import DataConfig
from rmprune.data import folder
from rmprune.data.folder import FolderSplit
from rmprune.data.sources import Images
from rmprune.data.splits import TensorSplit

COUNT = 100_000


class Listing(list[tuple[str, int]]):
    """A long list of samples, all of one file, that counts how many were looked at."""

    looked_at = 0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[str, int]:  # type: ignore[override]
        self.looked_at += 1
        return str(self.path), index % 7

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return map(self.__getitem__, range(COUNT))


@pytest.fixture
def listing(tmp_path: Path) -> Listing:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    return Listing(tmp_path / "0.png")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were made, one for each image of a plan."""
    made: list[int] = []
    seed = folder.batch_seed
    monkeypatch.setattr(folder, "batch_seed", lambda *given: made.append(given[1]) or seed(*given))
    return made


def split_of(listing: Listing, workers: int = 0) -> FolderSplit:
    return FolderSplit(listing, DataConfig(dataset="imagefolder", image_size=8, workers=workers))


def test_an_example_of_a_folder_plans_and_reads_its_images_alone(listing: Listing, planned: list[int]) -> None:
    x = split_of(listing).example(2)
    assert x.shape == (2, 3, 8, 8) and torch.equal(x[0], x[1])
    assert listing.looked_at == 2 == len(planned)


def test_an_example_of_a_folder_starts_no_process(listing: Listing) -> None:
    split_of(listing, workers=2).example(2)
    assert listing.looked_at == 2  # in this process: a worker would count in its own copy


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_a_pass_over_a_folder_is_planned_as_it_goes(
    listing: Listing, planned: list[int], shuffle_seed: int | None
) -> None:
    batches = split_of(listing).batches(4, shuffle_seed=shuffle_seed)
    for number in range(1, 3):
        next(batches)
        assert listing.looked_at == 4 * number and len(planned) <= 4 * (number + 1)


def test_an_example_moves_no_whole_split_to_a_device() -> None:
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    split = TensorSplit(Images(images, torch.arange(20)), torch.zeros(1), torch.ones(1), may_flip=False)
    assert split.example(3, device="meta").device.type == "meta"
    assert split._held is None
    assert torch.equal(split.example(3), images[:3].float())
    assert len(split.example(50)) == 20
