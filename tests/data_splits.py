"""A split whose images tell their number."""

import torch

from rmprune.data.sources import Images
from rmprune.data.splits import TensorSplit


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
