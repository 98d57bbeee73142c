"""Splits: order, shards, statistics and augmentation."""

import hashlib

import torch
from data_splits import numbered_split

from rmprune.config import DataConfig
from rmprune.data.load import load_dataset
from rmprune.data.sources import Images
from rmprune.data.splits import TensorSplit, augment_batch, channel_statistics


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
    top, left = torch.randint(3, (2, 64))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    for image, cropped, i, j in zip(padded, augment_batch(images, top, left), top, left, strict=True):
        assert torch.equal(image[:, i : i + 8, j : j + 8], cropped)
    flipped = augment_batch(images, top, left, torch.arange(64) % 2 == 0)
    assert torch.equal(flipped[::2], augment_batch(images, top, left)[::2].flip(3))
    assert torch.equal(flipped[1::2], augment_batch(images, top, left)[1::2])


def test_every_window_is_drawn_and_flips_only_where_classes_allow_it():
    images = torch.zeros(640, 1, 8, 8, dtype=torch.uint8)
    images[..., 3:5, 1:3] = 9  # left of the middle, out of reach of the crop
    labels = torch.zeros(640, dtype=torch.int64)
    for may_flip, sides in ((False, {True}), (True, {True, False})):
        split = TensorSplit(Images(images, labels), torch.zeros(1), torch.ones(1), may_flip=may_flip)
        x = torch.cat([x for x, _ in split.batches(64, shuffle_seed=0, augment=True)])
        assert set((x[..., :4].sum((1, 2, 3)) > x[..., 4:].sum((1, 2, 3))).tolist()) == sides
        assert len({image.numpy().tobytes() for image in x}) == 9 * len(sides)
    assert not load_dataset(DataConfig()).train.may_flip


def test_augmentation_draws_what_it_always_drew():
    """The images of 0.1.0: runs that were begun then go on with them."""
    x = torch.cat([x for x, _ in numbered_split(may_flip=True).batches(8, shuffle_seed=5, augment=True)])
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] == "64b7f991b2415416"
