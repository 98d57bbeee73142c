"""Photos that stand, byte for byte, in two parts of a data set (test accuracy is too good by them) or in two classes: said in the log."""

import contextlib
import itertools
import logging
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rmprune.errors import in_one_line
from rmprune.runs.reading import sha256_of

logger = logging.getLogger("rmprune")
MOST_PHOTOS = 100_000
"""Of more no size is asked for, which takes seconds, and minutes over a network."""
HEAD = 2**12
"""Bytes that are read of each photo of a size that occurs in two parts."""
MOST_BYTES = 2**30
"""That are read at most of photos whose sizes and first bytes are equal."""
Mark = tuple[str, str]
"""A part and a class."""


def warn_of_duplicates(paths: list[str], parts: Mapping[str, Iterable[int]], classes: Sequence[str] = ()) -> None:
    """parts: {name: the numbers of its photos among `paths`}; `classes`: that of each of these, where photos in two are said as well."""
    part_of = {number: name for name, own in parts.items() for number in own}
    if len(part_of) > MOST_PHOTOS:
        logger.info("more than %d photos: whether one is in two parts is not looked at", MOST_PHOTOS)
        return
    found = _equal(paths, {number: (part, classes[number] if classes else "") for number, part in part_of.items()})
    for place, what in enumerate(
        (
            "parts (training, validation, test) under two names, byte for byte: results are too good by them; take one of each out",
            "classes under two names, byte for byte; leave each in its own",
        )
    ):
        several = [one for group in found if len(one := {mark[place]: number for mark, number in group.items()}) > 1]
        if several:
            shown = "; ".join(" = ".join(paths[number] for number in list(one.values())[:2]) for one in several[:2])
            many = "photo is" if len(several) == 1 else "photos are"
            logger.warning("%d %s in two %s (%s)", len(several), many, what, in_one_line(shown[:500]))


def _equal(paths: list[str], mark_of: Mapping[int, Mark]) -> list[dict[Mark, int]]:
    """Equal files of several marks: for each mark the number of one."""

    def split(groups: Iterable[list[int]], key: Callable[[str], object]) -> list[list[int]]:
        found: list[list[int]] = []
        for group in groups:
            alike: dict[object, list[int]] = {}
            for number in group:
                with contextlib.suppress(OSError):  # named where it is decoded
                    alike.setdefault(key(paths[number]), []).append(number)
            found += [own for own in alike.values() if len({mark_of[number] for number in own}) > 1]
        return found

    sizes: dict[str, int] = {}

    def size(path: str) -> int:
        about = Path(path).stat()
        if not stat.S_ISREG(about.st_mode):
            raise OSError("a pipe would never end")
        sizes[path] = about.st_size
        return about.st_size

    near = split(split([list(mark_of)], size), _head)
    totals = itertools.accumulate(sizes[paths[group[0]]] * len(group) for group in near)
    read = [group for group, total in zip(near, totals, strict=True) if total <= MOST_BYTES]
    return [{mark_of[number]: number for number in group} for group in split(read, lambda path: sha256_of(Path(path)))]


def _head(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(HEAD)
