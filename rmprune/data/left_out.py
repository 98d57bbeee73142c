"""What of a folder of photos is not read, or is of another class than it may seem: said in the log, with a count and one name."""

import itertools
import logging
import os
from collections import Counter
from pathlib import Path

from rmprune.data.walk import ENDINGS, is_folder
from rmprune.errors import in_one_line

logger = logging.getLogger("rmprune")
_MOST_FOLDERS = 1000
"""That are looked into where nothing is read: a .git holds many."""


def is_photo(name: str) -> bool:
    """By its ending; ._a.jpg is what macOS keeps about one."""
    return Path(name).suffix.lower() in ENDINGS and not name.startswith("._")


def photos_of(entries: list[os.DirEntry[str]]) -> list[str]:
    """The photos among these files and, however deep, in these folders, a link to none of which is followed."""
    found: list[str] = []
    for entry in entries:
        if is_folder(entry):
            inside = itertools.islice(os.walk(entry.path), _MOST_FOLDERS)
            found += [str(Path(at, name)) for at, _, names in inside for name in sorted(names) if is_photo(name)]
        elif is_photo(entry.name):
            found.append(entry.path)
    return found


def say_left_out(root: Path, photos: list[str], why: str) -> None:
    """`why`: and what to do."""
    if photos:
        logger.warning("%s: left out: %s (first: %s): %s", root, _count(len(photos)), in_one_line(photos[0]), why)


def say_nested(root: Path, photos: list[str]) -> None:
    """These lie in folders within those of classes."""
    if photos:
        logger.info(
            "%s: %s in folders within others (first: %s): the outermost folder names the class; if the inner ones should, say so by "
            "--labels FILE.csv",
            root,
            _count(len(photos)),
            in_one_line(photos[0]),
        )


def say_other(root: Path, kinds: Counter[str]) -> None:
    """Ending -> how many files have it that are no photos."""
    if kinds:
        counted = ", ".join(f"{count} {kind or 'without an ending'}" for kind, count in kinds.most_common(8))
        logger.info("%s: left out, no images that are read: %s", root, counted)


def _count(photos: int) -> str:
    return f"{photos:,} photo{'s' * (photos > 1)}"
