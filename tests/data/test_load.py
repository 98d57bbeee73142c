"""Data sets by name: disjoint splits, seeds, and what unknown ones raise."""

from pathlib import Path

import pytest
import torch
from data_splits import all_images

from rmprune.config import DataConfig
from rmprune.config.data import unread_by
from rmprune.data.load import DATASETS, load_dataset
from rmprune.errors import ConfigError, DataError


def test_digits_splits_are_disjoint_stratified_and_scaled():
    data = load_dataset(DataConfig())
    assert data.input_shape == (1, 8, 8) and data.num_classes == 10
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert 0.19 < len(data.test) / 1797 < 0.21
    assert data.train.images.max() == 255 and data.train.images.min() == 0
    for split in (data.train, data.validation, data.test):
        counts = torch.bincount(split.labels, minlength=10)
        assert counts.max() - counts.min() <= 0.1 * len(split)
    parts = [all_images(split) for split in (data.train, data.validation, data.test)]
    assert not parts[0] & parts[2] and not parts[1] & parts[2] and not parts[0] & parts[1]


def test_split_seed_moves_validation_and_leaves_the_test_images():
    first, again, other = (load_dataset(DataConfig(split_seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.validation.images, again.validation.images)
    assert not torch.equal(first.validation.images, other.validation.images)
    assert torch.equal(first.test.images, other.test.images)


def test_train_images_takes_a_fixed_part():
    whole, part = load_dataset(DataConfig()), load_dataset(DataConfig(train_images=100))
    assert len(part.train) == 100 and all_images(part.train) <= all_images(whole.train)
    assert torch.equal(part.train.images, load_dataset(DataConfig(train_images=100)).train.images)
    assert torch.equal(part.validation.images, whole.validation.images)
    with pytest.raises(ConfigError, match="has 1295"):
        load_dataset(DataConfig(train_images=5000))


def test_unknown_names_and_folders():
    with pytest.raises(DataError, match="cifar10") as caught:
        load_dataset(DataConfig(dataset="minst"))
    assert all(name in str(caught.value) for name in DATASETS)
    with pytest.raises(DataError, match=r"is a file \(an archive\? unpack it\); give an existing one"):
        load_dataset(DataConfig("imagefolder", Path(__file__)))
    with pytest.raises(DataError, match="does not exist"):
        load_dataset(DataConfig(dataset="fashion-mnist", data_dir=Path("/nowhere/at/all")))
    with pytest.raises(DataError, match=f"folder nowhere does not exist in {Path.cwd()}; give an existing one"):
        load_dataset(DataConfig(dataset="fashion-mnist", data_dir=Path("nowhere")))


@pytest.mark.parametrize("field", [{"validation": 0.0}, {"validation": 1.0}, {"batch_size": 0}, {"train_images": 0}])
def test_settings_outside_their_range(field: dict):
    with pytest.raises(ConfigError, match=next(iter(field))):
        DataConfig(**field)


@pytest.mark.parametrize(
    "name", ["image_size", "crop", "normalization", "test", "labels", "image_column", "label_column", "group_column"]
)
def test_settings_of_photos_are_refused_by_other_data_sets(name: str) -> None:
    other = {"normalization": "half", "image_size": 300, "crop": 0.5, "test": 0.5}.get(name, "x")
    with pytest.raises(
        ConfigError, match=f"^{name} is for dataset imagefolder, but the data set is cifar10; add --dataset imagefolder"
    ):
        DataConfig("cifar10", **{name: other})
    DataConfig("cifar10", **{name: getattr(DataConfig(), name)})  # as a run's own config.toml says it


def test_a_folder_of_digits_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data_dir is for dataset fashion-mnist or .* or imagefolder, but the data set is digits"
    ):
        DataConfig(data_dir=Path("photos"))
    with pytest.raises(DataError, match="no data set 'imagefoldr'"):
        load_dataset(DataConfig("imagefoldr", data_dir=Path("photos")))
    assert not unread_by("imagefolder") and all(unread_by(name) for name in DATASETS if name != "imagefolder")
