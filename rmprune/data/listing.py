"""Which images a folder of photos has, of which class, in which part: from its folders or from a CSV file. It opens no image."""

from __future__ import annotations

import contextlib
import csv
import os
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets import ImageFolder

from rmprune.config import DataConfig
from rmprune.errors import DataError

LAYOUT = "it needs CLASS/image.jpg, or train/CLASS/image.jpg with or without val/ and test/ beside train/; or --labels FILE.csv"
PARTS = ("train", "val", "test")
_LARGEST_CSV = 2**30  # bytes


class Photo(NamedTuple):
    """One image file, the number of its class, its part ("" where parts are to be drawn) and its group ("": its own)."""

    path: str
    label: int
    part: str
    group: str


class Listing(NamedTuple):
    """All images of a folder, and the names of the classes in the order of their numbers."""

    photos: list[Photo]
    classes: tuple[str, ...]


def list_photos(config: DataConfig) -> Listing:
    """The images that these settings name. Raises DataError for another layout, empty classes, a single one, or what a CSV lacks."""
    if config.data_dir is None:
        raise DataError(f"imagefolder needs --data-dir; {LAYOUT}")
    root = Path(config.data_dir)
    found = _from_folders(root) if config.labels is None else _from_csv(root, config)
    if len(found.classes) < 2:
        raise DataError(f"{root}: all images are of one class, {found.classes[0]!r}; there is nothing to tell apart")
    parts = sorted({photo.part for photo in found.photos}, key=(*PARTS, "").index)
    for part in parts:
        there = {photo.label for photo in found.photos if photo.part == part}
        if missing := [name for number, name in enumerate(found.classes) if number not in there]:
            raise DataError(
                f"{root}: {' and '.join(f'{one}/' for one in parts)} differ in classes: {part}/ has no image of {missing[0]!r}"
            )
    _refuse_shared_groups(root, found.photos)
    return found


def _from_folders(root: Path) -> Listing:
    parts = [part for part in PARTS if (root / part).is_dir()]
    if parts and "train" not in parts:
        raise DataError(f"{root}: there is {parts[0]}/ but no train/; {LAYOUT}")
    for part in parts or [""]:
        _refuse_repeated_folders(root / part)
    opened = {part: _open(root / part) for part in parts} or {"": _open(root)}
    classes = sorted({name for folder in opened.values() for name in folder.classes})
    number = {name: i for i, name in enumerate(classes)}
    photos = [
        Photo(path, number[folder.classes[label]], part, "")
        for part, folder in opened.items()
        for path, label in folder.samples
    ]
    seen: dict[tuple[int, int], Photo] = {}
    for photo in photos:
        with contextlib.suppress(OSError):  # a link that leads nowhere is named where it is opened
            about = Path(photo.path).stat()
            first = seen.setdefault((about.st_dev, about.st_ino), photo)
            if (first.label, first.part) != (photo.label, photo.part):
                raise DataError(
                    f"{first.path} and {photo.path} are one file by a link; it has one class and part: take one out"
                )
    return Listing(photos, tuple(classes))


def _refuse_repeated_folders(root: Path) -> None:
    """A link may lead to a folder that is read already, or round in a circle: its photos would count many times."""
    seen: dict[tuple[int, int], str] = {}
    for folder, _, _ in os.walk(root, followlinks=True):
        about = Path(folder).stat()
        if (first := seen.setdefault((about.st_dev, about.st_ino), folder)) != folder:
            raise DataError(
                f"{first} and {folder} are one folder by a link; its photos would count twice: take one out"
            )


def _open(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(str(folder))
    except OSError as error:  # no such folder, no class folders, a class without images
        reason = " ".join(str(error).split()).split(" Supported extensions")[0]
        raise DataError(f"{folder} is missing or a class of it has no images ({reason}); {LAYOUT}") from None


def _from_csv(root: Path, config: DataConfig) -> Listing:
    """One row for an image: its path below the folder, and what the settings' columns say of it."""
    assert config.labels is not None
    file = root / config.labels if (root / config.labels).is_file() else Path(config.labels)
    rows = _read_rows(file)
    columns = list(rows[0])
    for name in (config.image_column, *([config.group_column] if config.group_column else [])):
        if name not in columns:
            raise DataError(f"{file}: has no column {name!r}; there are: {', '.join(columns)[:200]}")
    labelled = config.label_column in columns
    names = [row[config.label_column] if labelled else Path(row[config.image_column]).parent.name for row in rows]
    classes = sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    photos: list[Photo] = []
    spelled: dict[str, str] = {}  # file -> its path in the CSV
    for row, name in zip(rows, names, strict=True):
        image = row[config.image_column]
        path = root / image
        if not path.is_file():
            raise DataError(f"{file}: {image!r}: no such file under {root}")
        real = os.path.realpath(path)
        if real in spelled:
            also = "" if spelled[real] == image else f" (one calls it {spelled[real]!r})"
            raise DataError(f"{file}: {image!r} stands in two rows{also}; an image belongs to one class and one part")
        spelled[real] = image
        if not name:
            what = "is empty" if labelled else "is missing, and no folder names the class"
            raise DataError(f"{file}: {image!r}: column {config.label_column!r} {what}; give each image its class")
        part = {"validation": "val", "valid": "val"}.get(row.get("split", ""), row.get("split", ""))
        if "split" in columns and part not in PARTS:
            raise DataError(f"{file}: {image!r} has split {part!r}; use train, val or test")
        photos.append(Photo(str(path), number[name], part, row[config.group_column] if config.group_column else ""))
    if "split" in columns and not any(photo.part == "train" for photo in photos):
        raise DataError(f"{file}: no row has split 'train'")
    return Listing(photos, tuple(classes))


def _read_rows(file: Path) -> list[dict[str, str]]:
    try:
        if file.exists() and (not file.is_file() or file.stat().st_size > _LARGEST_CSV):
            raise ValueError("not a regular file of at most 1 GiB")
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV ({error}); give --labels FILE.csv with a header") from None
    if not rows:
        raise DataError(f"{file}: has no rows; it needs a header and a row for each image")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise DataError(f"{file}: row {number} has another number of columns than the header")
    return rows


def _refuse_shared_groups(root: Path, photos: list[Photo]) -> None:
    """Raise DataError where images of one group lie in two parts: frames of one object would be trained on and tested on."""
    part_of: dict[str, str] = {}
    for photo in photos:
        if photo.group and part_of.setdefault(photo.group, photo.part) != photo.part:
            raise DataError(
                f"{root}: group {photo.group!r} is in {part_of[photo.group]} and in {photo.part}; put all its images into one"
            )
