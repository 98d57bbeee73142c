"""ImageNet-layout folders (train/CLASS/*, val/CLASS/*) through loader processes; small sets are held in memory (splits.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from rmprune.config import DataConfig
from rmprune.data.splits import Batch, Share, Split, batch_seed, split_train
from rmprune.errors import DataError

# ImageNet's own statistics, as every pretrained network expects; those of the folder would cost a pass over all files.
_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
_LAYOUT = "it needs the ImageNet layout: train/CLASS/image.jpg and val/CLASS/image.jpg"


def load_image_folder(config: DataConfig) -> tuple[Split, Split, Split, int, tuple[int, int, int]]:
    """(train, validation, test = val/, number of classes, input shape (C, H, W)). Raises `DataError` for another layout."""
    if config.data_dir is None:
        raise DataError(f"imagefolder needs --data-dir; {_LAYOUT}")
    train, test = (_open(Path(config.data_dir) / part) for part in ("train", "val"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"{config.data_dir}: train/ and val/ differ in classes, such as {odd[0]!r}; {_LAYOUT}")
    held_back, kept = map(_mixed, split_train(torch.tensor(train.targets), config))
    splits = (
        FolderSplit([train.samples[i] for i in kept.tolist()], config),
        FolderSplit([train.samples[i] for i in held_back.tolist()], config),
        FolderSplit(test.samples, config),
    )
    return *splits, len(train.classes), (3, config.image_size, config.image_size)


class FolderSplit(Split):
    """A split of image files, (path, label) pairs, decoded and augmented by loader processes to 3 channels of image_size."""

    def __init__(self, samples: list[tuple[str, int]], config: DataConfig) -> None:
        self.samples, self.size, self.workers = samples, config.image_size, config.workers

    def __len__(self) -> int:
        return len(self.samples)

    def _read(self, shares: Iterator[Share], device: torch.device, *, augment: bool, single: bool) -> Iterator[Batch]:
        """Images are read, cropped and scaled by loader processes; for a single batch, in this one."""
        plan = (  # made batch by batch, as the loader asks for it
            [(index, batch_seed(share.seed, at)) for index, at in zip(share.indices.tolist(), share.positions.tolist(), strict=True)]
            for share in shares
        )  # fmt: skip
        loader = DataLoader(
            _Files(self.samples, self.size, augment),
            batch_sampler=plan,  # the keys are (index, seed) pairs
            num_workers=0 if single else self.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        mean, std = (255 * _MEAN.to(device)).view(-1, 1, 1), (255 * _STD.to(device)).view(-1, 1, 1)
        try:
            for images, labels in loader:
                yield (images.to(device, non_blocking=True).float() - mean) / std, labels.to(device, non_blocking=True)
        except DataError as error:  # from a worker it arrives with the worker's traceback
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None


class _Files(TorchDataset[tuple[Tensor, int]]):
    """Key (index, seed) -> (uint8 image [3, S, S], label); random transforms depend on the key alone."""

    def __init__(self, samples: list[tuple[str, int]], size: int, augment: bool) -> None:
        self.samples, self.augment = samples, augment
        cropped = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
        random = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose([v2.ToImage(), *(random if augment else cropped)])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        from PIL import Image

        index, seed = key
        path, label = self.samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises any of these on damaged files
            raise DataError(
                f"{path} is missing or damaged ({error}); replace it or take it out of the folder"
            ) from None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image).as_subclass(Tensor), label


def _mixed(indices: Tensor) -> Tensor:
    """The indices in a fixed random order: folders are sorted by class, and stages look at the first so many images."""
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]


def _open(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(str(folder))
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"{folder} is missing or has no images ({error}); {_LAYOUT}") from None
