"""Files from outside, looked at before they are read: regular files of a bounded size, JSON without duplicate keys or deep nesting."""

import hashlib
import json
from pathlib import Path
from typing import Any

from rmprune.errors import ArtifactError

# Bytes of text that a file may have; a network of a thousand layers describes itself in one million.
LARGEST_JSON = 2**24
LONGEST = 20  # digits of a whole number: as many as fit into a float and 64 bits
DEEPEST = 64  # lists in lists; beyond it Python's own recursion ends somewhere


def read_text(path: Path) -> str:
    """The text of a regular file: UTF-8, with or without the mark of byte order that Windows writes before it. Raises OSError where it
    cannot be read, ValueError where it is not such a file."""
    check_regular(path, LARGEST_JSON)
    return path.read_text(encoding="utf-8-sig")


def check_regular(path: Path, most: int | None = None) -> None:
    """Raise ValueError for a pipe or a device, which would never end, and for a file of more than `most` bytes, before it is read."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    if most is not None and (size := path.stat().st_size) > most:
        raise ValueError(f"{size} bytes, more than the {most} that such a file may have")


def sha256_of(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def not_data(path: Path) -> str:
    """What a file is that should hold weights, a network or a photo and can be read as none: empty, a pointer of git-lfs, a text such as
    the page of a failed download. "" where it is nothing of these; never raises.
    """
    try:
        if not path.is_file():  # a pipe would never end
            return ""
        with path.open("rb") as file:
            start = file.read(200)
    except OSError:
        return ""
    if not start:
        return "it is empty; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs in place of the file; run `git lfs pull`"
    text = " ".join(start.decode("utf-8", "replace").split())
    told = text[:40] if text.isprintable() and "\ufffd" not in text[:-1] else ""
    return f"it is a text that begins with {told!r}, perhaps of a failed download; download it again" if told else ""


def parse_json(text: str) -> Any:
    """The value that a JSON text describes. Raises ValueError where it is none, says a key twice, or nests deeper than DEEPEST."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_bounded)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    if "\\ud" in text.lower() and any("\ud800" <= sign <= "\udfff" for sign in json.dumps(value, ensure_ascii=False)):
        raise ValueError("a text with half a character, which is no Unicode")
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if any(isinstance(inner, dict | list) for inner in level):
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    return value


def read_json(path: Path, *, missing: str, damaged: str) -> Any:
    """The value in a JSON file. Raises ArtifactError that names the file, with `missing` or `damaged` as what to do."""
    try:
        return parse_json(read_text(path))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: {missing}") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged ({error}); {damaged}") from error


def _bounded(digits: str) -> int:
    if len(digits) > LONGEST:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found
