"""Reads the small image sets from where they lie into uint8 tensors; no splitting, batching or augmentation."""

from __future__ import annotations

import functools
import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmprune.errors import DataError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_IDX_NAMES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_GET_FASHION_MNIST = (
    "get the four .gz files with `apt-get install dataset-fashion-mnist`, or put them into a folder and pass --data-dir"
)
_DIGITS_TEST_FRACTION = 0.2
_DIGITS_TEST_SEED = 20211


class Images(NamedTuple):
    """Images uint8 [N, C, H, W] and labels int64 [N]."""

    images: Tensor
    labels: Tensor


class Source(NamedTuple):
    """All images of a set; `train` is not yet split into training and validation."""

    train: Images
    test: Images
    num_classes: int
    may_flip: bool  # a mirrored image keeps its class


def stratified_part(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """A mask [N] that is True for `fraction` of every class (at least one image of each), drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():  # sorted, so the draw does not depend on the order of classes
        members = (labels == label).nonzero().squeeze(1)
        count = max(1, round(fraction * len(members)))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen


def read_digits(data_dir: Path | None) -> Source:
    """scikit-learn's 1,797 digits of 8x8; a fifth of every class, always the same, is the test set."""
    images, labels = _digits()
    test = stratified_part(labels, _DIGITS_TEST_FRACTION, _DIGITS_TEST_SEED)
    return Source(Images(images[~test], labels[~test]), Images(images[test], labels[test]), 10, may_flip=False)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """uint8 [1797, 1, 8, 8] and int64 [1797], read once in a process: they come as text."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return images, torch.from_numpy(raw.target).to(torch.int64)


def read_fashion_mnist(data_dir: Path | None) -> Source:
    """The idx .gz files under `data_dir`; without one, those of Debian's package; else torchvision's download. Raises DataError for damaged
    files."""
    folder = _find_idx_folder(data_dir) or _download_fashion_mnist(cache_folder(data_dir))
    train, test = (Images(*_read_idx_pair(folder, part)) for part in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(f"{folder}: training and test images differ in size; {_GET_FASHION_MNIST}")
    return Source(train, test, 10, may_flip=True)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """A gzipped idx file of unsigned bytes as a uint8 tensor of so many dimensions.

    Raises `DataError` that names the file when it is missing, cut short, or not an idx file of this kind.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {_GET_FASHION_MNIST}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or unreadable ({error}); {_GET_FASHION_MNIST}") from None
    header = 4 + 4 * dimensions
    magic = 0x0800 + dimensions  # 0x08: unsigned bytes
    if len(content) < header or struct.unpack(">I", content[:4])[0] != magic:
        raise DataError(f"{path} is not an idx file of {dimensions} dimension(s) of bytes; {_GET_FASHION_MNIST}")
    sizes = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != int(np.prod(sizes, dtype=object)) or 0 in sizes:
        raise DataError(
            f"{path} is damaged: it announces {'x'.join(map(str, sizes))} bytes and holds {len(content) - header}; "
            f"{_GET_FASHION_MNIST}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy())


def read_cifar(name: str) -> Callable[[Path | None], Source]:
    """A reader of cifar10 or cifar100 through torchvision, which checks every file's MD5 sum before it reads it. Raises DataError where
    they cannot be had."""

    def read(data_dir: Path | None) -> Source:
        from torchvision import datasets

        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        root = Path(data_dir) if data_dir and (Path(data_dir) / kind.base_folder).is_dir() else cache_folder(data_dir)
        try:
            train, test = (kind(str(root), train=part, download=True) for part in (True, False))
        except Exception as error:  # torchvision lets through whatever the network, disk or archive raised
            _remove_empty(root, root.parent)
            raise DataError(
                f"{name}: {kind.base_folder} is not under {data_dir or root} and could not be downloaded "
                f"({_one_line(error)}); fetch {kind.url}, unpack it and pass the folder around it with --data-dir"
            ) from None

        def images(part: datasets.CIFAR10) -> Images:
            return Images(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))

        return Source(images(train), images(test), len(train.classes), may_flip=True)

    return read


READERS: dict[str, Callable[[Path | None], Source]] = {
    "digits": read_digits,
    "fashion-mnist": read_fashion_mnist,
    "cifar10": read_cifar("cifar10"),
    "cifar100": read_cifar("cifar100"),
}


def cache_folder(data_dir: Path | None) -> Path:
    """Where downloads and decoded images go: `cache/` in the data folder, or the user's cache."""
    if data_dir is not None:
        return Path(data_dir) / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmprune"


def _find_idx_folder(data_dir: Path | None) -> Path | None:
    """The folder that holds the idx files: all, or some, in which case reading names the one that is missing."""
    below = Path("FashionMNIST") / "raw"  # where torchvision puts them
    cache = cache_folder(data_dir) / below
    given = [Path(data_dir), Path(data_dir) / below] if data_dir else [DEBIAN_FASHION_MNIST]
    names = [name for pair in _IDX_NAMES.values() for name in pair]
    for folder in (*given, cache):
        if all((folder / name).is_file() for name in names):
            return folder
    # part of a download is no reason to stop, it is fetched again; part of what the user gave is
    return next((folder for folder in given if any((folder / name).is_file() for name in names)), None)


def _download_fashion_mnist(root: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)
    except Exception as error:  # torchvision lets through whatever the network, disk or archive raised
        _remove_empty(root / "FashionMNIST" / "raw", root.parent)
        raise DataError(
            f"fashion-mnist: {_IDX_NAMES['train'][0]} is not under {root.parent} and could not be downloaded "
            f"({_one_line(error)}); {_GET_FASHION_MNIST}"
        ) from None
    return root / "FashionMNIST" / "raw"


def _read_idx_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images_name, labels_name = _IDX_NAMES[part]
    images, labels = read_idx(folder / images_name, 3), read_idx(folder / labels_name, 1)
    if len(images) != len(labels) or int(labels.max()) > 9:
        raise DataError(f"{folder / labels_name} does not fit {images_name}; {_GET_FASHION_MNIST}")
    return images.unsqueeze(1), labels.to(torch.int64)


def _remove_empty(folder: Path, stop: Path) -> None:
    """Take away the empty folders that a failed download left, from `folder` up to `stop`, which stays."""
    while folder != stop and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
