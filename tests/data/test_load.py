"""Data sets: splits, order, augmentation, and what damaged files raise."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from rmprune.config import DataConfig
from rmprune.data import sources as data_sources
from rmprune.data.load import DATASETS, load_dataset
from rmprune.data.sources import Images, read_idx, stratified_part
from rmprune.data.splits import TensorSplit, augment_batch, channel_statistics
from rmprune.errors import ConfigError, DataError


def numbered_split(count: int = 20, size: int = 8, **kwargs: bool) -> TensorSplit:
    """Images whose label is their index and whose first pixel shows it."""
    images = torch.randint(
        0, 256, (count, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images[:, 0, 0, 0] = torch.arange(count)
    data = Images(images, torch.arange(count))
    return TensorSplit(data, torch.zeros(1), torch.ones(1), **({"may_flip": False} | kwargs))


def all_images(split: TensorSplit) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


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


def test_training_batches_are_normalised():
    data = load_dataset(DataConfig())
    x = torch.cat([x for x, _ in data.train.batches(256)])
    assert x.shape == (len(data.train), 1, 8, 8) and x.dtype == torch.float32
    assert abs(float(x.mean())) < 1e-4 and abs(float(x.std()) - 1) < 1e-3
    assert torch.equal(data.test.example(5), next(data.test.batches(5))[0])


def test_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (50, 3, 4, 5), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    torch.testing.assert_close(mean, images.double().mean((0, 2, 3)).float())
    torch.testing.assert_close(std, images.double().std((0, 2, 3), correction=0).float())


def test_order_follows_the_seed():
    split = numbered_split()

    def labels(seed: int | None) -> list[int]:
        return torch.cat([y for _, y in split.batches(8, shuffle_seed=seed)]).tolist()

    assert labels(None) == list(range(20))
    assert labels(3) == labels(3) != labels(4)
    assert len(set(labels(3))) == 16  # shuffled passes drop the last, smaller batch
    assert split.num_batches(8, shuffled=True) == 2 and split.num_batches(8, shuffled=False) == 3
    assert split.num_batches(64, shuffled=True) == 1 == len(list(split.batches(64, shuffle_seed=0)))


def test_start_continues_a_pass_exactly():
    split = numbered_split(may_flip=True)
    whole = list(split.batches(4, shuffle_seed=5, augment=True))
    rest = list(split.batches(4, shuffle_seed=5, augment=True, start=3))
    assert len(rest) == 2
    for (x, y), (x_rest, y_rest) in zip(whole[3:], rest, strict=True):
        assert torch.equal(x, x_rest) and torch.equal(y, y_rest)


def test_shards_make_up_the_batch():
    split = numbered_split(may_flip=True)
    whole = list(split.batches(8, shuffle_seed=5, augment=True))
    shards = [list(split.batches(8, shuffle_seed=5, augment=True, shard=(rank, 2))) for rank in (0, 1)]
    for number, (x, y) in enumerate(whole):
        for rank in (0, 1):
            assert torch.equal(shards[rank][number][0], x[rank::2])
            assert torch.equal(shards[rank][number][1], y[rank::2])


def test_limit_counts_images():
    assert sum(len(y) for _, y in numbered_split().batches(8, limit=11)) == 11


def test_crops_are_windows_of_the_padded_image():
    images = torch.randint(1, 256, (64, 2, 8, 8), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    out = augment_batch(images, generator, flip=False, drawn_for=64, positions=torch.arange(64))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    offsets = set()
    for image, cropped in zip(padded, out, strict=True):
        matches = [(i, j) for i in range(3) for j in range(3) if torch.equal(image[:, i : i + 8, j : j + 8], cropped)]
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) == 9


def test_flips_only_where_classes_allow_it():
    images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    images[..., 2:6, 1:3] = 9  # left of the middle, out of reach of the crop
    for flip, sides in ((False, {True}), (True, {True, False})):
        out = augment_batch(
            images, torch.Generator().manual_seed(0), flip=flip, drawn_for=64, positions=torch.arange(64)
        )
        left_heavy = out[..., :4].float().sum((1, 2, 3)) > out[..., 4:].float().sum((1, 2, 3))
        assert set(left_heavy.tolist()) == sides
    assert not load_dataset(DataConfig()).train.may_flip


def test_stratified_part_takes_its_share_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)
    chosen = stratified_part(labels, 0.1, seed=0)
    assert [int(chosen[labels == label].sum()) for label in range(3)] == [5, 2, 1]


# -------------------------------------------------------------------------------------------------- files on disk


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


def test_unknown_names_and_folders():
    with pytest.raises(DataError, match="cifar10") as caught:
        load_dataset(DataConfig(dataset="minst"))
    assert all(name in str(caught.value) for name in DATASETS)
    with pytest.raises(DataError, match="does not exist"):
        load_dataset(DataConfig(dataset="fashion-mnist", data_dir=Path("/nowhere/at/all")))


@pytest.mark.parametrize("field", [{"validation": 0.0}, {"validation": 1.0}, {"batch_size": 0}, {"train_images": 0}])
def test_settings_outside_their_range(field: dict):
    with pytest.raises(ConfigError, match=next(iter(field))):
        DataConfig(**field)


# --------------------------------------------------------------------------------------------------- image folders


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
