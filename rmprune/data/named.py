"""Which file of a folder a CSV means by a path. It opens none."""

import itertools
import operator
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePath

from rmprune.data.walk import ENDINGS, walked

ByKey = Callable[[], dict[str, Path | None]]
"""`photos_by_key` of the folder, looked up once where it is asked for."""


def named_file(root: Path, image: str, known: ByKey) -> Path | None:
    """The file that a CSV means: as it says, or with Windows' separators, in another case or form of Unicode, or without its ending."""
    try:
        for form in (image, image.strip()):
            if form and (root / form).is_file():
                return root / form
    except (OSError, ValueError):  # too long, or with a zero in it
        return None
    return known().get(path_key(image))


def photos_by_key(root: Path) -> dict[str, Path | None]:
    """All images by their `path_key`, with and without ending; None where several have one."""
    found: dict[str, Path | None] = {}
    for _, _, files in walked(root):
        for path in (Path(entry.path) for entry in files if Path(entry.name).suffix.lower() in ENDINGS):
            for form in (path, path.with_suffix("")):
                one = path_key(str(form.relative_to(root)))
                found[one] = None if one in found else path
    return found


def path_key(path: str) -> str:
    """What is equal for all spellings of a path."""
    return unicodedata.normalize("NFC", str(PurePath(path.strip().replace("\\", "/")))).casefold()


def why_not(root: Path, image: str, known: ByKey) -> str:
    """Why `named_file` finds none, with one of this name that lies elsewhere in the folder."""
    key = path_key(image)
    if key in known():
        return f"several files under {root} could be it"
    asked = key.split("/")[::-1]

    def alike(one: str) -> int:
        """How many names at the end of both are equal."""
        return len(list(itertools.takewhile(bool, map(operator.eq, asked, one.split("/")[::-1]))))

    nearest = max((one for one, path in known().items() if path), key=alike, default="")
    there = f" (there is {known()[nearest]}; the CSV names paths below --data-dir)" if alike(nearest) else ""
    return f"no such file under {root}{there}"
