"""Which images a run trains and tests on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rmprune.config.fields import changeable, require, require_seed


@dataclass(frozen=True)
class DataConfig:
    """Which images to train and test on, and how they are split and batched."""

    dataset: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100 or imagefolder."""
    data_dir: Path | None = None
    """Where the files lie, or where a download goes (not needed for digits)."""
    batch_size: int = 64
    """Images in a training batch (over all processes together)."""
    validation: float = 0.1
    """Fraction of the training images held back for selection; between 0 and 1."""
    split_seed: int = 0
    """Seed of the split into training and validation images. The test images never depend on it."""
    train_images: int | None = None
    """Train on so many images only, a fixed part drawn with split_seed."""
    workers: int = field(default=2, metadata=changeable())
    """Loader processes (imagefolder only)."""
    image_size: int = 224
    """Height and width of the images (imagefolder only)."""
    augment: bool = True
    """Random crops, and flips where the classes allow it."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}; it must be at least 1")
        require_seed("split_seed", self.split_seed)
        require(0 < self.validation < 1, f"validation is {self.validation}; it must lie between 0 and 1")
        require(
            self.train_images is None or self.train_images >= 1,
            f"train_images is {self.train_images}; it must be at least 1",
        )
        require(self.workers >= 0, f"workers is {self.workers}; it must not be negative")
        require(self.image_size >= 8, f"image_size is {self.image_size}; it must be at least 8")
