"""A CSV that says what photos show, whatever program wrote it: its rows, and which of its columns is which. It looks at no photo."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from pathlib import Path

from rmprune.data.walk import ENDINGS
from rmprune.errors import DataError
from rmprune.runs.reading import check_regular, not_data

USUAL_NAMES = {
    "image": "image file filename path filepath imagepath imagefile img imageid photo",
    "label": "label class target category classname labelname",
    "group": "group object patient groupid objectid patientid subject",
}
"""What else a CSV may call its columns, in lower case and without signs."""
_LARGEST_CSV = 2**30  # bytes


def read_rows(file: Path, image_column: str = "image") -> list[dict[str, str]]:
    """The rows of a CSV, of commas, semicolons, tabs or bars, in UTF-8, UTF-16 with its mark, or Windows' Western signs.

    Of the separators that is meant which gives a column of images (of this name, or a usual one), else most columns. Cells are as they
    stand. Raises DataError for what is no such file.
    """
    try:
        check_regular(file, _LARGEST_CSV)
        try:
            rows = _parsed(file, _encoding(file), image_column)
        except UnicodeDecodeError:
            rows = _parsed(file, "cp1252", image_column)
    except (OSError, ValueError, csv.Error) as error:
        what = not_data(file) if isinstance(error, UnicodeError) else ""
        raise DataError(
            f"{file}: cannot be read as CSV ({what or error}); give --labels FILE.csv with a header"
        ) from None
    if not rows:
        raise DataError(f"{file}: has no rows; it needs a header and a row for each image")
    return rows


def _parsed(file: Path, encoding: str, image_column: str) -> list[dict[str, str]]:
    with file.open(encoding=encoding, newline="") as text:
        first = next((line for line in text if line.strip()), "")
        told = first.strip().lower()
        if told.startswith("sep=") and len(told) == 5:  # Excel's
            separator, first = told[-1], next((line for line in text if line.strip()), "")
        else:
            separator = _separator(first, image_column)
        spaced = f'{separator} "' in first  # a quote behind a space is one all the same
        lines = csv.reader(itertools.chain([first], text), delimiter=separator, skipinitialspace=spaced)
        header = [name.strip() for name in next(lines, [])]
        if twice := next((name for name, count in Counter(header).items() if name and count > 1), None):
            raise DataError(f"{file}: two columns are called {twice!r}; give each its name")
        rows: list[dict[str, str]] = []
        for line in lines:
            if not any(cell.strip() for cell in line):
                continue
            if len(line) != len(header):
                raise DataError(f"{file}: row {len(rows) + 2} has another number of columns than the header")
            rows.append(dict(zip(header, line, strict=True)))
    return rows


def _separator(header: str, image_column: str) -> str:
    names = {sign: next(csv.reader([header], delimiter=sign), []) for sign in ",;\t|"}
    usual = {plain_name(image_column), *USUAL_NAMES["image"].split()}
    meant = [sign for sign, cells in names.items() if len(cells) > 1 and usual & set(map(plain_name, cells))]
    return meant[0] if meant else max(names, key=lambda sign: len(names[sign]))


def _encoding(file: Path) -> str:
    """By the mark that a file begins with. Raises ValueError for what is no text."""
    with file.open("rb") as opened:
        start = opened.read(10_000)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if b"\0" in start:
        raise ValueError("no text: a spreadsheet or archive, or UTF-16 without its mark; save it as CSV in UTF-8")
    return "utf-8-sig"


def plain_name(name: str) -> str:
    """A column's name as `USUAL_NAMES` spells it."""
    return "".join(sign for sign in name.lower() if sign.isalnum())


def column_of(file: Path, columns: list[str], kind: str, asked: str) -> str:
    """The column that is asked for, in any case; where that is the default, the only one of another usual name. "": no labels.

    Raises DataError that lists the columns where it is not there or several could be it.
    """
    if asked in columns:
        return asked
    default = asked == kind and kind != "group"
    may = USUAL_NAMES[kind].split() if default else [plain_name(asked)]
    found = [name for name in columns if plain_name(name) in may]
    if len(found) == 1:
        return found[0]
    if not found and default and kind == "label":
        return ""
    if photo := next((name for name in columns if Path(name).suffix.lower() in ENDINGS), None):
        raise DataError(
            f"{file}: its first line has a photo, {photo[:200]!r}; begin it with a line of names: image,label"
        )
    what = f"has no column {asked!r}" if not found else f"several columns could be the {kind}"
    raise DataError(f"{file}: {what}; there are: {', '.join(columns)[:200]}; say which by --{kind}-column")
