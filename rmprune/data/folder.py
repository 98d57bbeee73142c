"""Folders of photos as splits: parts named or drawn, augmentation, batches. What there is says listing.py; photos.py decodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from rmprune.config import DataConfig
from rmprune.config.data import Augmentation
from rmprune.data.depth import bit_depth
from rmprune.data.duplicates import warn_of_duplicates
from rmprune.data.listing import digest_of, list_photos
from rmprune.data.photos import Photos, one_line_errors, to_its_end
from rmprune.data.splits import (
    Batch,
    IndexedSplit,
    Share,
    Split,
    Statistics,
    batch_seed,
    draw_part,
    sent,
    some_of,
    split_train,
)
from rmprune.data.views import View, drawn, lightly_augmented, middle, views_of
from rmprune.errors import DataError

TEST_SEED = 20211  # where no test images are named: the same ones for every split_seed


class PhotoFolder(NamedTuple):
    """A folder of photos, divided. `train_labels`: int64 [N]; `classes`: their names; `depth`: the bits that 16-bit images use; `digest`:
    of all photos (`digest_of`)."""

    train: Split
    validation: Split
    test: Split
    train_labels: Tensor
    classes: tuple[str, ...]
    depth: int
    digest: str


def load_image_folder(config: DataConfig, statistics: Statistics) -> PhotoFolder:
    """Parts that the folder or CSV names are taken as they are; others are drawn, stratified by class, whole groups together; val/ without
    test/ is the test set, as ImageNet's is.

    Raises DataError for another layout, a damaged image (where a cache is made), and parts without an image of some class.
    """
    listing = list_photos(config)
    listed, classes = listing
    labels = torch.tensor([photo.label for photo in listed])
    groups = [photo.group for photo in listed] if config.group_column else None
    named = {
        part: torch.tensor([i for i, photo in enumerate(listed) if photo.part == part])
        for part in ("train", "val", "test")
    }
    test = named["test"] if len(named["test"]) else named["val"]
    if len(test):
        rest = named["train"]
    else:
        drawn = draw_part(labels, config.test, TEST_SEED, groups)
        test, rest = drawn.nonzero().squeeze(1), (~drawn).nonzero().squeeze(1)
    if len(named["test"]) and len(named["val"]):
        held_back, kept = named["val"], rest
    else:
        inside = None if groups is None else [groups[i] for i in rest.tolist()]
        held_back, kept = (rest[part] for part in split_train(labels[rest], replace(config, train_images=None), inside))
    for name, part in zip(("training", "validation", "test"), (kept, held_back, test), strict=True):
        counts = torch.bincount(labels[part], minlength=len(classes))
        if not counts.all():
            raise DataError(
                f"{config.data_dir}: class {classes[int(counts.argmin())]!r} has no image left for {name}; "
                "add images (or groups) of it, or take the class out"
            )
    parts = [_mixed(some_of(kept, config)), _mixed(held_back), test]
    paths = [photo.path for photo in listed]
    numbers = dict(zip(("train", "val", "test"), (part.tolist() for part in parts), strict=True))
    warn_of_duplicates(paths, numbers, [classes[photo.label] for photo in listed])
    photos = Photos(paths, config.photo_side, bit_depth(paths))
    photos.decode_all(config.cache, config.workers)
    splits = [FolderSplit(photos, part, labels[part], config, statistics) for part in parts]
    digest = digest_of(listing, Path(str(config.data_dir)))
    return PhotoFolder(splits[0], splits[1], splits[2], splits[0].labels, classes, photos.depth, digest)


class FolderSplit(IndexedSplit):
    """A split of image files, as 3 channels of image_size: `indices` int64 [N] into the photos, with their `labels` [N]."""

    def __init__(
        self, photos: Photos, indices: Tensor, labels: Tensor, config: DataConfig, statistics: Statistics
    ) -> None:
        self.photos, self.indices, self.labels, self.config = photos, indices, labels, config
        self._mean, self._std = (255 * torch.tensor(values).view(-1, 1, 1) for values in statistics)

    def __len__(self) -> int:
        return len(self.indices)

    def _read(self, shares: Iterator[Share], device: torch.device, *, augment: bool, single: bool) -> Iterator[Batch]:
        """Images are read and augmented by loader processes; from a cache or for a single batch in this one; on a GPU that can hold the
        cache, there.
        """
        kind = self.config.augmentation if augment else "none"
        at_hand = self.photos.squares is not None and kind != "imagenet"
        mean, std = self._mean.to(device), self._std.to(device)
        if at_hand and device.type == "cuda" and (squares := self.photos.on(device)) is not None:
            for images, labels in self._held(squares, list(shares), kind):
                yield (images.float() - mean) / std, labels
            return
        plan = (  # made batch by batch, as the loader asks for it
            [(index, batch_seed(share.seed, at)) for index, at in zip(share.indices.tolist(), share.positions.tolist(), strict=True)]
            for share in shares
        )  # fmt: skip
        loader = DataLoader(
            _Views(self, kind),
            batch_sampler=plan,  # the keys are (index, seed) pairs
            num_workers=0 if single or at_hand else self.config.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        with one_line_errors():
            for images, labels in to_its_end(loader):
                yield (images.to(device, non_blocking=True).float() - mean) / std, labels.to(device, non_blocking=True)

    def _held(self, squares: Tensor, plan: list[Share], kind: Augmentation) -> Iterator[Batch]:
        """The uint8 images and labels of each share, where the squares lie; what is drawn is drawn, and sent there, before the first."""
        size, side = self.config.image_size, squares.shape[-1]

        def view(seed: int) -> View:
            return drawn(side, size, torch.Generator().manual_seed(seed), kind)

        def rows(share: Share) -> Tensor:
            seeds = [batch_seed(share.seed, at) for at in share.positions.tolist()]
            views = [middle(side, size) if kind == "none" else view(seed) for seed in seeds]
            return torch.column_stack([self.indices[share.indices], self.labels[share.indices], torch.tensor(views)])

        for part in sent([rows(share) for share in plan], squares.device):
            yield views_of(squares, part[:, 0], part[:, 2:], size), part[:, 1]


class _Views(TorchDataset[tuple[Tensor, int]]):
    """Key (index, seed) -> (uint8 image [3, S, S], label); what is random depends on the key alone."""

    def __init__(self, split: FolderSplit, kind: Augmentation) -> None:
        self.split, self.kind, self.size = split, kind, split.config.image_size
        self.crop = v2.Compose(
            [v2.ToImage(), v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        )

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        number, label = int(self.split.indices[index]), int(self.split.labels[index])
        if self.kind == "imagenet":
            photo = self.split.photos.whole(number)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self.crop(photo).as_subclass(Tensor), label
        square = self.split.photos[number]
        if self.kind == "none":
            return v2.functional.center_crop(square, [self.size, self.size]), label
        return lightly_augmented(square, self.size, torch.Generator().manual_seed(seed), self.kind), label


def _mixed(indices: Tensor) -> Tensor:
    """The indices in a fixed random order: folders are sorted by class, and stages look at the first so many images."""
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
