"""A CSV that says what photos show, whatever program wrote it: its rows, and which of its columns is which. It looks at no photo."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

from rmprune.errors import DataError
from rmprune.runs.reading import not_data

USUAL_NAMES = {
    "image": "image file filename path filepath imagepath imagefile img imageid photo",
    "label": "label class target category classname labelname",
    "group": "group object patient groupid objectid patientid subject",
}
"""What else a CSV may call its columns, in lower case and without signs."""
_LARGEST_CSV = 2**30  # bytes


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV, of commas, semicolons, tabs or bars, in UTF-8, UTF-16 with its mark, or Windows' Western signs."""
    try:
        if file.exists() and (not file.is_file() or file.stat().st_size > _LARGEST_CSV):
            raise ValueError("not a regular file of at most 1 GiB")
        text = _decoded(file.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
        first, _, rest = text.partition("\n")
        told = first.strip().lower()
        if told.startswith("sep=") and len(told) == 5:  # Excel's
            separator, text = told[-1], rest
        else:
            separator = max(",;\t|", key=lambda sign: len(next(csv.reader([first], delimiter=sign), [])))
        lines = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        read = [(lines.line_num, [cell.strip() for cell in line]) for line in lines]
    except (OSError, ValueError, csv.Error) as error:
        what = not_data(file) if isinstance(error, UnicodeError) else ""
        raise DataError(
            f"{file}: cannot be read as CSV ({what or error}); give --labels FILE.csv with a header"
        ) from None
    rows = [(number, line) for number, line in read if any(line)]
    if len(rows) < 2:
        raise DataError(f"{file}: has no rows; it needs a header and a row for each image")
    header = rows[0][1]
    if twice := next((name for name, count in Counter(header).items() if name and count > 1), None):
        raise DataError(f"{file}: two columns are called {twice!r}; give each its name")
    for number, line in rows[1:]:
        if len(line) != len(header):
            raise DataError(f"{file}: row {number} has another number of columns than the header")
    return [dict(zip(header, line, strict=True)) for _, line in rows[1:]]


def _decoded(data: bytes) -> str:
    """Text by the mark it begins with. Raises ValueError for what is none."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    if b"\0" in data[:10_000]:
        raise ValueError("no text: a spreadsheet or archive, or UTF-16 without its mark; save it as CSV in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252")


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
    what = f"has no column {asked!r}" if not found else f"several columns could be the {kind}"
    raise DataError(f"{file}: {what}; there are: {', '.join(columns)[:200]}; say which by --{kind}-column")
