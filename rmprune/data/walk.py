"""The files of a folder and of all folders in it, each once, and told apart from links to them. It opens none."""

import contextlib
import operator
import os
from collections.abc import Iterator
from pathlib import Path

from rmprune.errors import DataError

ENDINGS = frozenset(
    f".{kind}"
    for kind in ("jpg", "jpeg", "jpe", "jfif", "png", "ppm", "pgm", "bmp", "tif", "tiff", "webp", "gif", "jp2", "avif")
)
"""Endings, in lower case, of the kinds of photos that depth.py opens."""


def walked(
    root: Path, hidden: list[os.DirEntry[str]] | None = None
) -> Iterator[tuple[str, int, list[os.DirEntry[str]]]]:
    """(folder, the device it is on, its files), sorted, links followed, without what is hidden, which `hidden` gets; no file is asked for
    more than its name.

    Raises DataError for a folder that cannot be read, or is there twice: a link may lead to one that is read already, or in a circle.
    """
    seen: dict[int, str] = {}
    waiting = [str(root)]
    while waiting:
        folder = waiting.pop()
        try:
            about = Path(folder).stat()
            with os.scandir(folder) as entries:
                found = sorted(entries, key=_name)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({error.strerror}); give a folder of photos that can") from None
        if (first := seen.setdefault(_number(about.st_dev, about.st_ino), folder)) != folder:
            raise DataError(
                f"{first} and {folder} are one folder by a link; its photos would count twice: take one out"
            )
        visible = [entry for entry in found if not is_hidden(entry.name)]
        if hidden is not None and len(visible) < len(found):
            hidden += [entry for entry in found if is_hidden(entry.name)]
        inner = [entry.path for entry in visible if is_folder(entry)]
        waiting += reversed(inner)
        yield folder, about.st_dev, [entry for entry in visible if not is_folder(entry)] if inner else visible


_name = operator.attrgetter("name")


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: named where it is opened
        return False


def _number(device: int, inode: int) -> int:
    """What two names of one file share; one number, since millions of pairs keep Python's collector busy."""
    return device << 64 | inode


def number_of(entry: os.DirEntry[str], device: int) -> int:
    """What two names of one file share. Only links are looked up; one that leads nowhere is named where it is opened."""
    if entry.is_symlink():
        with contextlib.suppress(OSError):
            about = entry.stat()
            return _number(about.st_dev, about.st_ino)
    return _number(device, entry.inode())


def size_of(path: str) -> int:
    """Bytes of a file; -1 where that cannot be had, which is said where it is opened."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def is_hidden(name: str) -> bool:
    """Whether an operating system or an editor made this: .DS_Store, ._a.jpg, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def same_file(one: str, other: str) -> bool:
    """Whether two names with one number are of one file: some file systems give all their files the same."""
    try:
        return Path(one).samefile(other)
    except OSError:  # gone, or a link that leads nowhere: named where it is opened
        return False
