"""Data sets by name, read and divided. Where files come from is the business of sources.py, batches that of splits.py."""

from dataclasses import dataclass
from pathlib import Path

from rmprune.config import DataConfig
from rmprune.data.sources import READERS, Images
from rmprune.data.splits import Split, TensorSplit, channel_statistics, split_train
from rmprune.errors import DataError

DATASETS: tuple[str, ...] = (*READERS, "imagefolder")


@dataclass(frozen=True)
class Dataset:
    """A data set ready to train on; `input_shape` is (C, H, W)."""

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    train: Split
    validation: Split
    test: Split
    config: DataConfig


def load_dataset(config: DataConfig) -> Dataset:
    """The data set that the config names. Raises `DataError` for an unknown name and missing or damaged files,
    `ConfigError` where it has fewer training images than asked for.
    """
    if config.dataset not in DATASETS:
        raise DataError(f"there is no data set {config.dataset!r}; there are: {', '.join(DATASETS)}")
    if config.data_dir is not None and not Path(config.data_dir).is_dir():
        raise DataError(f"the data folder {config.data_dir} does not exist; give an existing one with --data-dir")
    if config.dataset == "imagefolder":
        from rmprune.data.folder import load_image_folder  # PIL and loader processes, for this set only

        train, validation, test, num_classes, shape = load_image_folder(config)
        return Dataset(config.dataset, num_classes, shape, train, validation, test, config)
    source = READERS[config.dataset](config.data_dir)
    held_back, kept = split_train(source.train.labels, config)
    trained = Images(*(tensor[kept] for tensor in source.train))
    mean, std = channel_statistics(trained.images)
    parts = (trained, Images(*(tensor[held_back] for tensor in source.train)), source.test)
    train, validation, test = (TensorSplit(part, mean, std, may_flip=source.may_flip) for part in parts)
    shape = (trained.images.shape[1], trained.images.shape[2], trained.images.shape[3])
    return Dataset(config.dataset, source.num_classes, shape, train, validation, test, config)
