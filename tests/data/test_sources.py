"""Files of images: read, downloaded, and what damaged ones raise."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from rmprune.config import DataConfig
from rmprune.data import sources as data_sources
from rmprune.data.load import load_dataset
from rmprune.data.sources import read_idx, stratified_part
from rmprune.errors import DataError


def test_stratified_part_takes_its_share_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)
    chosen = stratified_part(labels, 0.1, seed=0)
    assert [int(chosen[labels == label].sum()) for label in range(3)] == [5, 2, 1]


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion_mnist(folder: Path, count: int = 40) -> None:
    generator = np.random.default_rng(0)
    for images, labels in data_sources._IDX_NAMES.values():
        write_idx(folder / images, generator.integers(0, 256, (count, 28, 28)))
        write_idx(folder / labels, np.arange(count) % 10)


def test_fashion_mnist_from_a_folder(tmp_path: Path):
    write_fashion_mnist(tmp_path)
    data = load_dataset(DataConfig(dataset="fashion-mnist", data_dir=tmp_path, validation=0.25))
    assert data.input_shape == (1, 28, 28) and data.train.may_flip
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 40)


@pytest.mark.parametrize("damage", ["cut", "text", "sizes", "kind", "count", "label"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str):
    write_fashion_mnist(tmp_path)
    name = "train-labels-idx1-ubyte.gz" if damage in ("count", "label") else "train-images-idx3-ubyte.gz"
    path = tmp_path / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "text":
        path.write_text("<html>not found</html>")
    elif damage == "sizes":
        path.write_bytes(gzip.compress(struct.pack(">4I", 0x0803, 40, 28, 28) + bytes(100)))
    elif damage == "kind":
        write_idx(path, np.zeros(40))
    elif damage == "count":
        write_idx(path, np.zeros(39))
    else:
        write_idx(path, np.full(40, 10))
    with pytest.raises(DataError, match=name) as caught:
        load_dataset(DataConfig(dataset="fashion-mnist", data_dir=tmp_path))
    assert "apt-get install dataset-fashion-mnist" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is missing"):
        load_dataset(DataConfig(dataset="fashion-mnist", data_dir=tmp_path))


def test_part_of_a_download_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision import datasets

    raw = tmp_path / "cache" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"half")
    monkeypatch.setattr(datasets, "FashionMNIST", lambda root, download: write_fashion_mnist(raw))
    assert len(load_dataset(DataConfig(dataset="fashion-mnist", data_dir=tmp_path)).test) == 40


def test_huge_announced_sizes_do_not_allocate(tmp_path: Path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x0803, 2**31, 2**31, 2**31) + bytes(10)))
    with pytest.raises(DataError, match="damaged"):
        read_idx(path, 3)


@pytest.mark.parametrize(("name", "kind"), [("fashion-mnist", "FashionMNIST"), ("cifar10", "CIFAR10")])
def test_a_download_that_fails_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str):
    from torchvision import datasets

    class Offline:
        base_folder, url = "cifar-10-batches-py", "https://example.org/cifar.tar.gz"

        def __init__(self, *args: object, **kwargs: object) -> None:
            Path(str(args[0]), *(("FashionMNIST", "raw") if kind == "FashionMNIST" else ())).mkdir(parents=True)
            raise OSError("no route to host")

    monkeypatch.setattr(datasets, kind, Offline)
    with pytest.raises(DataError, match="no route to host") as caught:
        load_dataset(DataConfig(dataset=name, data_dir=tmp_path))
    assert "--data-dir" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())  # nothing half-written
