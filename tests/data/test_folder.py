"""Folders of photographs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rmprune.config import DataConfig
from rmprune.data.load import load_dataset
from rmprune.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{i}.png")
    return tmp_path


def test_image_folder(folder: Path):
    config = DataConfig(dataset="imagefolder", data_dir=folder, image_size=16, validation=0.25, workers=0)
    data = load_dataset(config)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 6)
    assert data.num_classes == 2 and data.input_shape == (3, 16, 16)
    state = torch.get_rng_state()
    whole = list(data.train.batches(4, shuffle_seed=1, augment=True))
    rest = list(data.train.batches(4, shuffle_seed=1, augment=True, start=1))
    assert torch.equal(state, torch.get_rng_state())
    assert [tuple(x.shape) for x, _ in whole] == [(4, 3, 16, 16)] * 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[1:], rest, strict=True))
    assert not torch.equal(whole[0][0], next(data.train.batches(4, shuffle_seed=2, augment=True))[0])


def test_the_first_images_of_a_folder_are_of_many_classes(folder: Path):
    data = load_dataset(DataConfig(dataset="imagefolder", data_dir=folder, image_size=16, validation=0.25, workers=0))
    for split, count in ((data.train, 6), (data.validation, 3)):
        assert len(next(split.batches(count))[1].unique()) == 2


def test_image_folder_workers_yield_the_same(folder: Path):
    alone, helped = (
        load_dataset(DataConfig(dataset="imagefolder", data_dir=folder, image_size=16, workers=workers))
        for workers in (0, 1)
    )
    for (x, y), (x2, y2) in zip(
        alone.train.batches(4, shuffle_seed=1, augment=True),
        helped.train.batches(4, shuffle_seed=1, augment=True),
        strict=True,
    ):
        assert torch.equal(x, x2) and torch.equal(y, y2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(folder: Path, workers: int):
    (folder / "val" / "cat" / "1.png").write_bytes(b"not an image")
    data = load_dataset(DataConfig(dataset="imagefolder", data_dir=folder, image_size=16, workers=workers))
    with pytest.raises(DataError, match=r"1\.png is missing or damaged") as caught:
        list(data.test.batches(2))
    assert "\n" not in str(caught.value)


def test_another_folder_layout(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    (folder / "val" / "cat").rename(folder / "val" / "cow")
    with pytest.raises(DataError, match="differ in classes"):
        load_dataset(DataConfig(dataset="imagefolder", data_dir=folder))
    with pytest.raises(DataError, match="ImageNet layout"):
        load_dataset(DataConfig(dataset="imagefolder", data_dir=tmp_path_factory.mktemp("empty")))
    with pytest.raises(DataError, match="--data-dir"):
        load_dataset(DataConfig(dataset="imagefolder"))
