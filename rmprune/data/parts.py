"""Which part of a folder of photos (train, val, test) is which: by its folders, or by a column of a CSV. It draws none."""

import logging
import operator
import os
from pathlib import Path

from rmprune.data.left_out import photos_of, say_left_out
from rmprune.data.table import plain_name
from rmprune.data.walk import is_hidden
from rmprune.errors import DataError

logger = logging.getLogger("rmprune")
LAYOUT = "it needs CLASS/image.jpg, or train/CLASS/image.jpg with or without val/ and test/ beside train/; or --labels FILE.csv"
PARTS = ("train", "val", "test")
PART_OF = {name: name for name in PARTS} | {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


def parts_of_folder(root: Path) -> dict[str, str]:
    """Part -> its folder. Beside train/, val/ and test/ count other spellings of them that hold folders (of classes), in their place.

    Raises DataError where several could be one part, or where Train/ could be a class as well.
    """

    def folders(at: Path) -> list[str]:
        with os.scandir(at) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))

    try:
        names = folders(root)
        found = {name: [name] for name in PARTS if name in names}
        for name in names:
            part = PART_OF.get(name.lower())
            if part is not None and part not in names and folders(root / name):
                found.setdefault(part, []).append(name)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); {LAYOUT}") from None
    if "train" not in found:
        return {part: part for part in found if part in names}  # others may be classes
    for part, several in found.items():
        if len(several) > 1:
            raise DataError(
                f"{root}: {' and '.join(f'{name}/' for name in several)} are one part, {part}; take one out"
            )
    parts = {part: found[part][0] for part in PARTS if part in found}
    other = [name for name in names if name not in parts.values()]
    if other and list(parts) == ["train"] and parts["train"] != "train":
        raise DataError(
            f"{root}: {parts['train']}/ holds folders and stands beside {', '.join(other)[:100]}; call it train/ if those are classes, or "
            "name each image's class by --labels FILE.csv"
        )
    if other:
        logger.info("%s: %s: left out, beside %s/", root, ", ".join(other)[:200], parts["train"])
    with os.scandir(root) as entries:
        beside = sorted(
            (entry for entry in entries if entry.name not in parts.values()), key=operator.attrgetter("path")
        )
    say_left_out(root, photos_of(beside), f"beside {parts['train']}/; put each into the folder of its part and class")
    return parts


def parts_by_folder(file: Path, paths: list[str]) -> list[str]:
    """The part of each image of a CSV that names none: that of its folder, where all lie in train/ and in val/ or test/, or folders of such
    names; else "". The log says so."""
    real = list(map(os.path.abspath, paths))
    above = len(os.path.commonpath(real).rstrip(os.sep)) + 1
    folders = [first if slash else "" for first, slash, _ in (path[above:].partition(os.sep) for path in real)]
    found = {name: PART_OF.get(name.lower(), "") for name in folders}
    parts = {part for part in found.values() if part}
    if len(parts) < 2:
        return [""] * len(paths)
    names = " and ".join(f"{name}/" for name in sorted(found) if found[name])
    if "train" in parts and all(found.values()):
        logger.info("%s: no column 'split': %s name the parts", file, names)
        return [found[name] for name in folders]
    other = next((path for path, name in zip(paths, folders, strict=True) if not found[name]), "there is no train/")
    logger.warning(
        "%s: parts are drawn from all images alike, whether in %s or not (%s); a column 'split' would name them",
        file,
        names,
        other,
    )
    return [""] * len(paths)


def split_column(file: Path, rows: list[dict[str, str]], used: set[str]) -> str:
    """The column that names parts: `split`, else the only one that names nothing else, which the log says; "" where there is none.

    Raises DataError where several could be it. `used`: columns of another meaning.
    """
    columns = [name for name in rows[0] if name not in used]
    if split := next((name for name in columns if plain_name(name) == "split"), ""):
        return split
    may = [name for name in columns if _names_parts({row[name].strip().lower() for row in rows})]
    if len(may) > 1:
        raise DataError(
            f"{file}: columns {' and '.join(map(repr, may))} name parts; call the one that is meant 'split'"
        )
    if may:
        logger.info("%s: column %r is taken for 'split'", file, may[0])
    return "".join(may)


def _names_parts(cells: set[str]) -> bool:
    parts = {PART_OF.get(cell, "") for cell in cells}
    return "" not in parts and "train" in parts and len(parts) > 1
