"""Which images a folder of photos has, of which class, in which part: from its folders or from a CSV file. It opens no image."""

from __future__ import annotations

import hashlib
import itertools
import logging
import operator
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rmprune.config import DataConfig
from rmprune.data.duplicates import MOST_PHOTOS
from rmprune.data.left_out import photos_of, say_left_out, say_nested, say_other
from rmprune.data.named import named_file, photos_by_key, why_not
from rmprune.data.parts import LAYOUT, PART_OF, PARTS, parts_by_folder, parts_of_folder, split_column
from rmprune.data.table import USUAL_NAMES, column_of, plain_name, read_rows
from rmprune.data.walk import ENDINGS, number_of, same_file, size_of, walked
from rmprune.errors import DataError, in_one_line

logger = logging.getLogger("rmprune")
_WHOLE = r"^(-?)0*([0-9]+)(?:\.0*)?$"


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
        inner = config.labels is None and len({Path(photo.path).parent for photo in found.photos}) > 1
        hint = (
            "; if its folders are the classes, give it with --data-dir" if inner else "; there is nothing to tell apart"
        )
        raise DataError(f"{root}: all images are of one class, {found.classes[0]!r}{hint}")
    if wrong := next((name for name in found.classes if any("\ud800" <= sign <= "\udfff" for sign in name)), None):
        raise DataError(f"{root}: class {wrong!r} has a name that is no Unicode, which no record could hold; rename it")
    _warn_of_alike(root, found.classes)
    parts = sorted({photo.part for photo in found.photos}, key=(*PARTS, "").index)
    for part in parts:
        there = {photo.label for photo in found.photos if photo.part == part}
        if missing := [name for number, name in enumerate(found.classes) if number not in there]:
            hint = "" if config.labels is None else "; name the parts in the CSV's column 'split'"
            raise DataError(
                f"{root}: {' and '.join(f'{one}/' for one in parts)} differ in classes: {part}/ has no image of {missing[0]!r}{hint}"
            )
    _refuse_shared_groups(root, found.photos)
    return found


def digest_of(listing: Listing, root: Path) -> str:
    """A SHA-256 of what parts are drawn from: of each photo its place in `root`, class, part and group, and its bytes' number, unless
    there are more than MOST_PHOTOS."""
    said = hashlib.sha256(repr(listing.classes).encode())
    sized = len(listing.photos) <= MOST_PHOTOS
    for photo in listing.photos:
        said.update(repr((photo.path.removeprefix(str(root)), *photo[1:], sized and size_of(photo.path))).encode())
    return said.hexdigest()


def _from_folders(root: Path) -> Listing:
    parts = parts_of_folder(root)
    if parts and "train" not in parts:
        raise DataError(f"{root}: there is {min(parts.values())}/ but no train/; {LAYOUT}")
    opened = {part: _images(root / name) for part, name in parts.items()} or {"": _images(root)}
    classes = sorted({name for found in opened.values() for name in found})
    number = {name: i for i, name in enumerate(classes)}
    photos: list[Photo] = []
    seen: dict[int, Photo] = {}
    for part, found in opened.items():
        for name, files in found.items():
            for path, file in files.items():
                photo = Photo(path, number[name], part, "")
                first = seen.setdefault(file, photo)
                if first is not photo and first[1:] != photo[1:] and same_file(first.path, path):
                    raise DataError(
                        f"{in_one_line(first.path)} and {in_one_line(path)} are one file by a link; it has one class and part: take one out"
                    )
                photos.append(photo)
    return Listing(photos, tuple(classes))


def _images(root: Path) -> dict[str, dict[str, int]]:
    """Class -> its images, each with the number of its file, of folders within it too; the log says what else is left out.

    Raises DataError for a folder that cannot be read or is there twice, and where there are no classes or one of them has no image.
    """
    images: dict[str, dict[str, int]] = {}
    other: Counter[str] = Counter()
    hidden: list[os.DirEntry[str]] = []
    nested: list[str] = []
    for folder, device, files in sorted(walked(root, hidden), key=operator.itemgetter(0)):
        if folder == str(root):
            say_left_out(root, photos_of(files), "beside the folders of classes; put each into its class's")
            continue
        name, *inner = Path(folder).relative_to(root).parts
        own = images.setdefault(name, {})
        before = len(own)
        for entry in files:
            _, dot, kind = entry.name.rpartition(".")
            if (ending := dot + kind.lower() if dot else "") in ENDINGS:
                own[entry.path] = number_of(entry, device)
            else:
                other[ending] += 1
        if inner:
            nested += itertools.islice(own, before, None)
    say_left_out(root, photos_of(hidden), "hidden; rename what should be read")
    say_nested(root, nested)
    say_other(root, other)
    if empty := [name for name, paths in images.items() if not paths]:
        raise DataError(f"{root}: no image of {', '.join(map(repr, empty))[:200]}; add some, or take the folder out")
    if not images:
        raise DataError(f"{root}: no folders of classes; {LAYOUT}")
    return images


def _from_csv(root: Path, config: DataConfig) -> Listing:
    """One row for an image: its path below the folder, and what the settings' columns say of it."""
    file = config.labels_file
    assert file is not None
    rows = read_rows(file, config.image_column)
    columns = _columns(file, rows, config)
    known = cache(lambda: photos_by_key(root))
    alike = _alike(row[columns.group] for row in rows) if columns.group else {}
    named: list[tuple[Photo, str]] = []  # with the name of its class
    spelled: dict[str, str] = {}  # file -> its path in the CSV
    for row in rows:
        image = row[columns.image]
        path = named_file(root, image, known)
        if path is None:
            raise DataError(f"{file}: {image[:200]!r}: {why_not(root, image, known)}")
        real = os.path.realpath(path)
        if real in spelled:
            also = "" if spelled[real] == image else f" (one calls it {spelled[real]!r})"
            raise DataError(f"{file}: {image!r} stands in two rows{also}; an image belongs to one class and one part")
        spelled[real] = image
        folder = path.parent.name if path.parent != root else ""
        name = _class_of(row, folder, columns, config)
        group = alike[row[columns.group]].strip() if columns.group else ""
        named.append((Photo(str(path), 0, _part_of(row, columns, file), group), name))
    if not columns.split:
        parts = parts_by_folder(file, [photo.path for photo, _ in named])
        named = [(photo._replace(part=part), name) for (photo, name), part in zip(named, parts, strict=True)]
    elif not any(photo.part == "train" for photo, _ in named):
        raise DataError(f"{file}: no row has split 'train'")
    return _numbered(named, by_label=bool(columns.label))


class _Columns(NamedTuple):
    """The names of the columns that say an image's path, class, group and part; "" where none does."""

    image: str
    label: str
    group: str
    split: str


def _columns(file: Path, rows: list[dict[str, str]], config: DataConfig) -> _Columns:
    """Those that the settings mean; the log says where that is a guess."""
    there = list(rows[0])
    image = column_of(file, there, "image", config.image_column)
    label = column_of(file, there, "label", config.label_column)
    group = column_of(file, there, "group", config.group_column) if config.group_column else ""
    for column, asked in ((image, config.image_column), (label, config.label_column)):
        if column not in ("", asked):
            logger.info("%s: column %r is taken for %r", file, column, asked)
    if not group and (likely := [name for name in there if plain_name(name) in USUAL_NAMES["group"].split()]):
        logger.info(
            "%s: photos of one %s may be in two parts; --group-column %s keeps them together",
            file,
            likely[0],
            likely[0],
        )
    if not label:
        logger.info("%s: no column of labels (there are: %s); the folder names the class", file, ", ".join(there)[:200])
    return _Columns(image, label, group, split_column(file, rows, {image, label, group}))


def _class_of(row: dict[str, str], folder: str, columns: _Columns, config: DataConfig) -> str:
    """What the row says, or the folder that the image lies in. Raises DataError where that is nothing."""
    if name := row[columns.label].strip() if columns.label else folder:
        return name
    what = (
        f"column {columns.label!r} is empty"
        if columns.label
        else f"column {config.label_column!r} is missing, and no folder names the class"
    )
    raise DataError(f"{config.labels_file}: {row[columns.image]!r}: {what}; give each image its class")


def _part_of(row: dict[str, str], columns: _Columns, file: Path) -> str:
    """Of PARTS, or empty where no column names them. Raises DataError for another word than theirs."""
    if not columns.split:
        return ""
    if part := PART_OF.get(row[columns.split].strip().lower(), ""):
        return part
    raise DataError(f"{file}: {row[columns.image]!r} has split {row[columns.split]!r}; use train, val or test")


def _numbered(named: list[tuple[Photo, str]], *, by_label: bool) -> Listing:
    """These photos with the numbers of their classes: in the order of the names, of labels that are numbers in theirs (2 before 10)."""
    classes = sorted({name for _, name in named})
    if by_label and all(re.fullmatch(r"-?[0-9]{1,15}(\.0+)?", name) for name in classes):
        classes.sort(key=float)
    number = {name: i for i, name in enumerate(classes)}
    return Listing([photo._replace(label=number[name]) for photo, name in named], tuple(classes))


def _alike(names: Iterable[str]) -> dict[str, str]:
    """Each of these names -> the first that a person reads as the same: but for case, spaces, how letters are composed, and how a whole
    number is written (1, 01, 1.0)."""
    first: dict[str, str] = {"": ""}
    found: dict[str, str] = {}
    for name in names:
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        found[name] = first.setdefault(re.sub(_WHOLE, r"\1\2", plain), name)
    return found


def _warn_of_alike(root: Path, classes: tuple[str, ...]) -> None:
    """Of names that a person reads as one."""
    for name, first in _alike(classes).items():
        if first != name:
            logger.warning("%s: classes %r and %r are two; if they are one, give them one spelling", root, first, name)


def _refuse_shared_groups(root: Path, photos: list[Photo]) -> None:
    """Raise DataError where images of one group lie in two parts: frames of one object would be trained on and tested on."""
    part_of: dict[str, str] = {}
    for photo in photos:
        if photo.group and part_of.setdefault(photo.group, photo.part) != photo.part:
            raise DataError(
                f"{root}: group {photo.group!r} is in {part_of[photo.group]} and in {photo.part}; put all its images into one by the "
                "CSV's column 'split'"
            )
