"""One part of a data set: normalised batches, in order or shuffled; how a set is divided into its parts. Reads no files.

Small sets are held as one uint8 tensor and augmented by batch on the device. Every random draw follows from
(shuffle_seed, number of the batch), so a run that goes on in the middle of an epoch sees what it would have seen. All are drawn on
the CPU, whatever the device, which then sees the same images, and before the first batch, so that none waits for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rmprune.config import DataConfig, require
from rmprune.data.batches import Loss
from rmprune.data.sources import Images, stratified_part
from rmprune.errors import DataError

Batch = tuple[Tensor, Tensor]


class Statistics(NamedTuple):
    """What images are normalised with, by channel, in units of 0 to 1: (pixel - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET_STATISTICS = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Share(NamedTuple):
    """What one shard reads of a batch of `size` images: indices into the split, their positions in the batch; `seed` is the batch's."""

    seed: int
    size: int
    positions: Tensor
    indices: Tensor


class Split(ABC):
    """One part of a data set. Images come normalised by channel: (pixel - mean) / deviation, those of the training images
    (of the pretrained weights, or of ImageNet, for folders; as they are where somebody else loads them).

    `loss`: what is minimised, a function of (model, y), where it is not the cross entropy; y is then all that the loader gave.
    """

    loss: Loss | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Images in this part."""

    def num_batches(self, batch_size: int, *, shuffled: bool) -> int:
        """Batches of one pass. A shuffled pass drops the last, smaller batch, unless it is the only one."""
        return max(1, len(self) // batch_size) if shuffled else -(-len(self) // batch_size)

    @abstractmethod
    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", shuffle_seed: int | None = None,
        augment: bool = False, memory_format: torch.memory_format = torch.contiguous_format, start: int = 0,
        shard: tuple[int, int] = (0, 1), limit: int | None = None,
    ) -> Iterator[Batch]:  # fmt: skip
        """Yield (x float32 [B, C, H, W], y int64 [B]) on `device`; B is `batch_size`, fewer in the last batch and in shards.

        Without `shuffle_seed` in the stored order and complete; with it in that seed's order (see `num_batches`).
        `start` skips so many batches without reading them; `shard` (i, n) yields every n-th image of each batch from
        the i-th on; `limit` stops after so many images, and nothing is spent on the others. Raises `DataError` for a file
        that cannot be read.
        """

    def example(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """The first n images, float32 [n, C, H, W], normalised and without augmentation; all, if there are fewer. Raises DataError where
        there is none."""
        if (n := min(n, len(self))) == 0:
            raise DataError("the data hold no images")
        return next(self.batches(n, limit=n))[0].to(device)  # the split itself stays where it is


class IndexedSplit(Split):
    """A split whose images have numbers: it is shuffled, skipped and shared out by them."""

    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", shuffle_seed: int | None = None,
        augment: bool = False, memory_format: torch.memory_format = torch.contiguous_format, start: int = 0,
        shard: tuple[int, int] = (0, 1), limit: int | None = None,
    ) -> Iterator[Batch]:  # fmt: skip
        shares = self._shares(batch_size, shuffle_seed, start, shard, limit)
        single = limit is not None and limit <= batch_size
        for x, y in self._read(shares, torch.device(device), augment=augment, single=single):
            yield x.contiguous(memory_format=memory_format), y

    @abstractmethod
    def _read(self, shares: Iterator[Share], device: torch.device, *, augment: bool, single: bool) -> Iterator[Batch]:
        """Yield the images of each share, normalised, and their labels, on `device`; `single`: there is one batch at most."""

    def _shares(
        self, batch_size: int, shuffle_seed: int | None, start: int, shard: tuple[int, int], limit: int | None
    ) -> Iterator[Share]:
        rank, world = shard
        if shuffle_seed is None:
            order = torch.arange(min(len(self), limit) if limit is not None else len(self))
        else:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))[:limit]
            order = order[: max(1, len(order) // batch_size) * batch_size]
        for number in range(start, -(-len(order) // batch_size)):
            indices = order[number * batch_size : (number + 1) * batch_size]
            mine = torch.arange(rank, len(indices), world)
            if len(mine):  # the last batch may be smaller than the number of shards
                yield Share(batch_seed(shuffle_seed or 0, number), len(indices), mine, indices[mine])


class TensorSplit(IndexedSplit):
    """A split held in memory as uint8 [N, C, H, W]. `mean` and `std`: [C], in units of 0..255."""

    def __init__(self, data: Images, mean: Tensor, std: Tensor, *, may_flip: bool) -> None:
        self.images, self.labels, self.may_flip = data.images, data.labels, may_flip
        self._shift, self._scale = mean.view(-1, 1, 1), (1 / std).view(-1, 1, 1)  # in units of 0..255
        self._held: tuple[torch.device, Tensor, Tensor] | None = None  # the copy on another device

    def __len__(self) -> int:
        return len(self.images)

    def _read(self, shares: Iterator[Share], device: torch.device, *, augment: bool, single: bool) -> Iterator[Batch]:
        """The whole split lies on the device and is augmented there, a batch at a time."""
        images, labels = self._on(device)
        shift, scale = self._shift.to(images.device), self._scale.to(images.device)
        plan = list(shares)
        chosen = sent([share.indices for share in plan], images.device)
        kinds = zip(*map(self._windows, plan), strict=True) if augment else ()
        windows = [sent(list(kind), images.device) for kind in kinds]
        for number, at in enumerate(chosen):
            x = augment_batch(images[at], *(kind[number] for kind in windows)) if augment else images[at]
            yield (x.float() - shift) * scale, labels[at]

    def _windows(self, share: Share) -> tuple[Tensor, ...]:
        """What `augment_batch` needs: drawn for the whole batch, so that every shard of it sees what the whole would have seen."""
        generator = torch.Generator().manual_seed(share.seed)
        ends = [2 * padding(size) + 1 for size in self.images.shape[2:]]
        drawn = [torch.randint(end, (share.size,), generator=generator) for end in ends]
        if self.may_flip:
            drawn.append(torch.rand(share.size, generator=generator) < 0.5)
        return tuple(kind[share.positions] for kind in drawn)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device == self.images.device:
            return self.images, self.labels
        if self._held is None or self._held[0] != device:
            self._held = (device, self.images.to(device), self.labels.to(device))
        return self._held[1], self._held[2]


def draw_part(labels: Tensor, fraction: float, seed: int, groups: list[str] | None = None) -> Tensor:
    """A mask [N], True for about `fraction` of every class, drawn with `seed`; images of one group stay together.

    Groups are taken in random order, each where it brings the classes' counts nearer to what is wanted, so the parts are as
    stratified as the groups allow. Of a class that got none, the group that disturbs least follows.
    """
    if groups is None:
        return stratified_part(labels, fraction, seed)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group or f"image {index}", []).append(index)
    sets = [torch.tensor(found) for found in members.values()]
    # Images of each class that are still wanted, or too many below 0.
    missing = fraction * torch.bincount(labels).double()
    chosen = torch.zeros(len(labels), dtype=torch.bool)

    def after(inside: Tensor) -> Tensor:
        return missing - torch.bincount(labels[inside], minlength=len(missing))

    order = [sets[i] for i in torch.randperm(len(sets), generator=torch.Generator().manual_seed(seed)).tolist()]
    for inside in order:
        if (left := after(inside)).abs().sum() < missing.abs().sum():
            missing, chosen[inside] = left, True
    for label in labels.unique():
        if not chosen[labels == label].any():
            inside = min(
                (one for one in order if (labels[one] == label).any()), key=lambda one: float(after(one).abs().sum())
            )
            missing, chosen[inside] = after(inside), True
    return chosen


def split_train(labels: Tensor, config: DataConfig, groups: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Indices (validation, training), int64 [V] and [T], of the training images, whose `labels` are int64 [N].

    Disjoint, stratified by class, drawn with split_seed, groups whole. Raises `ConfigError` where train_images are more than there
    are, `DataError` where none is left to train on.
    """
    held_back = draw_part(labels, config.validation, config.split_seed, groups)
    return held_back.nonzero().squeeze(1), some_of((~held_back).nonzero().squeeze(1), config)


def some_of(kept: Tensor, config: DataConfig) -> Tensor:
    """Of these training images [T] the part that train_images asks for. Raises as `split_train`."""
    if config.train_images is not None:
        require(
            config.train_images <= len(kept),
            f"train_images is {config.train_images}, but {config.dataset} has {len(kept)} beside the validation split",
        )
        generator = torch.Generator().manual_seed(config.split_seed)
        kept = kept[torch.randperm(len(kept), generator=generator)[: config.train_images]].sort().values
    if not len(kept):
        column = config.group_column
        groups = (
            f"; column {column!r} makes too few groups: name another by --group-column, or leave it out"
            if column
            else "; there are too few: add some, or set a smaller --validation"
        )
        raise DataError(
            f"{config.dataset}: the validation split of {config.validation} leaves no image to train on{groups}"
        )
    return kept


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] over uint8 images [N, C, H, W], in units of 0..255; exact, from histograms."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(1)]).double()
    total = counts.sum(1)
    mean = counts @ values / total
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / total
    return mean.float(), variance.sqrt().clamp(min=1.0).float()


def batch_seed(seed: int, number: int) -> int:
    """A seed for batch `number` of the pass with this seed; neighbours do not collide."""
    return (seed * 1_000_003 + number * 7919 + 12345) % 2**63


def padding(size: int) -> int:
    """The zeros that `augment_batch` puts on each side of an image of this height or width."""
    return max(1, size // 8)


def augment_batch(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Crop uint8 images [B, C, H, W] after padding an eighth of their size with 0, and mirror some of them.

    `top`, `left`: int64 [B], where each window begins, from 0 to twice the `padding`; `mirrored`: bool [B].
    """
    _, _, height, width = images.shape
    pad_y, pad_x = padding(height), padding(width)
    padded = torch.nn.functional.pad(images, (pad_x, pad_x, pad_y, pad_y))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, 2p+1, 2p+1, H, W]
    cropped = windows[torch.arange(len(images), device=images.device), :, top, left]
    return cropped if mirrored is None else torch.where(mirrored[:, None, None, None], cropped.flip(3), cropped)


def sent(parts: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """The parts on the device, in one copy."""
    return torch.cat(parts).to(device).split([len(part) for part in parts]) if parts else ()
