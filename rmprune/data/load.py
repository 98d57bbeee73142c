"""Data sets by name, read and divided. Where files come from is the business of sources.py, batches that of splits.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rmprune.config import DataConfig
from rmprune.data.sources import READERS, Images
from rmprune.data.splits import (
    HALF,
    IMAGENET_STATISTICS,
    Split,
    Statistics,
    TensorSplit,
    channel_statistics,
    split_train,
)
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
    classes: tuple[str, ...] = ()
    """Their names, in the order of the numbers; empty where they have none but these."""
    statistics: Statistics | None = None
    """What images are normalised with."""
    class_weights: Tensor | None = None
    """[C], of the loss, with which all classes count alike; None counts images."""
    depth: int = 16
    """Bits that 16-bit images use (`rmprune.data.depth.bit_depth`)."""
    photos: str = ""
    """A digest of which photos there are (`rmprune.data.listing.digest_of`); empty for data sets that never change."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of training images in an epoch."""
        return self.train.num_batches(self.config.batch_size, shuffled=True)


Load = Callable[[DataConfig, Statistics], "Dataset"]
"""`load_dataset`, or one that remembers."""


def load_dataset(config: DataConfig, expected: Statistics = IMAGENET_STATISTICS) -> Dataset:
    """The data set that the config names; photos are normalised as `expected`, unless the config says how. Raises `DataError` for an
    unknown name and missing or damaged files, `ConfigError` where it has fewer training images than asked for.
    """
    if config.dataset not in DATASETS:
        raise DataError(f"there is no data set {config.dataset!r}; there are: {', '.join(DATASETS)}")
    if config.data_dir is not None and not Path(config.data_dir).is_dir():
        gone = f"does not exist{looked_for(config.data_dir)}"
        what = "is a file (an archive? unpack it)" if Path(config.data_dir).exists() else gone
        raise DataError(f"the data folder {config.data_dir} {what}; give an existing one with --data-dir")
    if config.dataset == "imagefolder":
        from rmprune.data.folder import load_image_folder  # PIL and loader processes, for this set only

        statistics = {"auto": expected, "imagenet": IMAGENET_STATISTICS, "half": HALF}[config.normalization]
        found, side = load_image_folder(config, statistics), config.image_size
        return Dataset(
            config.dataset,
            len(found.classes),
            (3, side, side),
            found.train,
            found.validation,
            found.test,
            config,
            found.classes,
            statistics,
            _weights(found.train_labels, len(found.classes)) if config.balance else None,
            found.depth,
            found.digest,
        )
    source = READERS[config.dataset](config.data_dir)
    held_back, kept = split_train(source.train.labels, config)
    trained = Images(*(tensor[kept] for tensor in source.train))
    mean, std = channel_statistics(trained.images)
    parts = (trained, Images(*(tensor[held_back] for tensor in source.train)), source.test)
    train, validation, test = (TensorSplit(part, mean, std, may_flip=source.may_flip) for part in parts)
    shape = (trained.images.shape[1], trained.images.shape[2], trained.images.shape[3])
    statistics = Statistics(tuple((mean / 255).tolist()), tuple((std / 255).tolist()))
    weights = _weights(trained.labels, source.num_classes) if config.balance else None
    return Dataset(config.dataset, source.num_classes, shape, train, validation, test, config, (), statistics, weights)


def looked_for(path: Path) -> str:
    """Where a path that is not there was looked for, as the end of what is said of it; nothing where it says so itself."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}"


def _weights(labels: Tensor, classes: int) -> Tensor:
    """Weights [C] that are 1 on average over these images and give every class that is there the same part."""
    counts = torch.bincount(labels, minlength=classes)
    return torch.where(counts > 0, len(labels) / (counts.clamp(min=1) * (counts > 0).sum()), 0.0)
