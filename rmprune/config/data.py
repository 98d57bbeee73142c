"""Which images a run trains and tests on."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from rmprune.config.fields import Settings, changeable, read_by, require, require_inside, require_seed

Augmentation = Literal["none", "light", "mirrors", "turns", "imagenet"]
CacheKind = Literal["auto", "disk", "memory", "none"]
_SETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder")
_PHOTOS = read_by("imagefolder")


@dataclass(frozen=True)
class DataConfig(Settings):
    """Which images to train and test on, and how they are split and batched."""

    dataset: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or imagefolder: one's own photos (docs/photos.md)."""
    data_dir: Path | None = field(default=None, metadata=read_by(*_SETS[1:]))
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
    image_size: int = field(default=224, metadata=_PHOTOS)
    """Height and width of the images (imagefolder only)."""
    augment: bool | Augmentation = True
    """none; light: shifts, and mirrored where the classes allow it; mirrors: upside down too; turns: by quarters too; imagenet:
    crops of 8 % of the photo and more (imagefolder only). True: imagenet for an imagefolder, light for the others."""
    crop: float = field(default=0.875, metadata=_PHOTOS)
    """Part of the photo's shorter side that is seen, in the middle; 1: up to its edges (imagefolder only)."""
    normalization: Literal["auto", "imagenet", "half"] = field(default="auto", metadata=_PHOTOS)
    """auto: what --weights expects where that is known, else ImageNet's mean and deviation; half: 0.5 and 0.5 (imagefolder only)."""
    test: float = field(default=0.2, metadata=_PHOTOS)
    """Fraction of the images held back for the test where no folder or CSV names them; always the same ones (imagefolder only)."""
    labels: Path | None = field(default=None, metadata=_PHOTOS)
    """CSV with a row for each image, in the place of class folders (imagefolder only); a column `split` names parts."""
    image_column: str = field(default="image", metadata=_PHOTOS)
    """The CSV's column with the path below data_dir; by default one called image, file, filename, path or the like."""
    label_column: str = field(default="label", metadata=_PHOTOS)
    """The CSV's column with the class; by default one called label, class, target, category or the like, and without one the class is the
    folder that the image lies in."""
    group_column: str | None = field(default=None, metadata=_PHOTOS)
    """The CSV's column that says what belongs together (frames of one object): never in two parts."""
    balance: bool = False
    """Weigh the classes in the loss so that all count alike, however many images they have."""
    cache: CacheKind = field(default="auto", metadata=changeable())
    """Where photos lie once they are decoded (imagefolder only): disk, memory, none; auto takes the first that has room."""
    transforms: str | None = None
    """Refused: transforms are code, and nothing read from outside is executed. From Python `rmprune.training.fit` takes a Split."""

    @property
    def augmentation(self) -> Augmentation:
        """What `augment` means for this data set."""
        if isinstance(self.augment, str):
            return self.augment
        return "none" if not self.augment else "imagenet" if self.dataset == "imagefolder" else "light"

    @property
    def photo_side(self) -> int:
        """Pixels to which the shorter side of a photo is scaled; of that square `image_size` is seen (imagefolder only)."""
        return round(self.image_size / self.crop)

    @property
    def labels_file(self) -> Path | None:
        """The CSV of `labels`, below data_dir where there is one of this name."""
        if self.labels is None or self.data_dir is None or not (self.data_dir / self.labels).is_file():
            return self.labels
        return self.data_dir / self.labels

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_read()
        require_inside(self, "[1, inf)", "batch_size", "train_images")
        require_inside(self, "(0, 1)", "validation", "test")
        require_inside(self, "[0, inf)", "workers")
        require_inside(self, "[8, inf)", "image_size")
        require_inside(self, "(0, 1]", "crop")
        require_seed("split_seed", self.split_seed)
        require(
            self.augment not in ("mirrors", "turns", "imagenet") or self.dataset == "imagefolder",
            f"augment is {self.augment!r}, which is for an imagefolder; use light or none",
        )
        require(
            self.group_column is None or self.labels is not None,
            "group_column is a column of the CSV; give it with --labels",
        )
        require(
            self.transforms is None,
            f"{str(self.transforms)[:200]} would be executed, and nothing read from outside is; take --augment, or call "
            "rmprune.training.fit from Python with a Split of your own",
        )

    def _require_read(self) -> None:
        """Raise ConfigError for the first setting that is set and that this data set never reads."""
        for own in (own for own in fields(self) if own.name in unread_by(self.dataset)):
            readers = own.metadata["read_by"]
            require(
                getattr(self, own.name) == own.default,
                f"{own.name} is for dataset {' or '.join(readers)}, but the data set is {self.dataset}; "
                f"add --dataset {readers[-1]}, or leave {own.name} out",
            )


def unread_by(dataset: str) -> set[str]:
    """Names of the settings that this data set never reads; none where it is unknown here."""
    known = dataset in _SETS
    return {own.name for own in fields(DataConfig) if known and dataset not in own.metadata.get("read_by", _SETS)}
