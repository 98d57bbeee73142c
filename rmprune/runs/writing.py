"""Files written whole or not at all: under a temporary name in the same folder, flushed to the disk, renamed. No contents here."""

import contextlib
import ctypes
import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from rmprune.errors import ArtifactError

LEFT = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)")
"""The names of what is being written, and of a folder that steps aside for it: all that a writer that was killed leaves."""
LOCK_FILE = ".lock"
"""Held by the process that is at a run, in whose directory it lies."""
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary place beside `path`, to write a file or make a folder at; it takes the place of `path` when the block ends well.

    Missing folders above are made, and what a library made for its owner alone is read by whom the umask says. Where anything fails (a
    full disk, a folder that cannot be written), what stood at `path` stands there as it was, nothing but empty folders is left, and an
    error of the disk becomes an ArtifactError.
    """
    path = Path(path)
    work = _beside(path)
    with _one_clear_error(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield work
            for inner in [*work.rglob("*"), work] if work.is_dir() else [work]:
                _share(inner, _beside(path))
                _flush(inner)
            _put(work, path)
            _flush(path.parent)
        finally:
            _take_away(work)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file (UTF-8) whole or not at all; see `whole`. Returns its path."""
    with whole(path) as work:
        work.write_text(text, encoding="utf-8")
    return Path(path)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file (UTF-8), or leave the file as it was and raise ArtifactError.

    Where the file ends in a line that was cut short, the new one still begins a line of its own. When the disk gets it is left to
    the system: of a log, a power cut may take the last lines.
    """
    with _one_clear_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            data = (b"\n" if size and file.read(1) != b"\n" else b"") + line.encode() + b"\n"
            try:
                written = file.write(data)
                if written != len(data):
                    raise OSError(f"only {written} of {len(data)} bytes could be written")
            except OSError:
                file.truncate(size)
                raise


def sweep(folder: Path, names: str = "**/.*", *, of: str = "") -> None:
    """Take away what writers that were killed left below a folder under such names, to which nobody else may be writing; what stepped
    aside for something that never came goes back to its place. Runs of their own below it, which have a lock, are left alone.
    `of`: only what was to be of that name."""
    runs = {lock.parent for lock in folder.rglob(LOCK_FILE)} - {folder} if "**" in names else set()
    for left in list(folder.glob(names)):
        found = None if runs & {*left.parents} else LEFT.fullmatch(left.name)
        if of and found and found[1] != of:
            continue
        if found and found[2] == "old" and not left.with_name(found[1]).exists():
            left.rename(left.with_name(found[1]))
        elif found:
            _take_away(left)


def sweep_beside(path: Path) -> None:
    """The same for what writers of this file or folder left beside it."""
    sweep(path.parent, f".{glob.escape(path.name)}.*", of=path.name)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def _one_clear_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, UnicodeEncodeError) as error:
        reason, culprit = getattr(error, "strerror", None) or error, getattr(error, "filename", None)
        if culprit is not None and Path(culprit) in path.parents:
            reason = f"{culprit}: {reason}"
        raise ArtifactError(
            f"{path}: cannot be written ({reason}); free some space or choose another folder. What stood there before is unchanged"
        ) from error


def _put(work: Path, path: Path) -> None:
    """`work` in the place of `path`. Two folders change places in one step; where the file system cannot do this, the one that
    stands there steps aside first, and back where the last step fails."""
    if not (work.is_dir() and path.is_dir()):
        work.replace(path)
        return
    if _exchange(work, path):
        return
    old = work.with_suffix(".old")
    path.rename(old)
    try:
        work.rename(path)
    except OSError:
        old.rename(path)
        raise
    _take_away(old)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places, and say whether that could be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _share(place: Path, probe: Path) -> None:
    """Give a file or folder that only its owner may read the mode of a new one: safetensors and tempfile make theirs so."""
    if place.stat().st_mode & 0o077:
        return
    with contextlib.suppress(OSError):  # not every file system has modes
        (probe.mkdir if place.is_dir() else probe.touch)()
        place.chmod(probe.stat().st_mode)
    _take_away(probe)


def _flush(place: Path) -> None:
    """Let the disk have a file, or the names in a folder, before anything relies on it."""
    if not place.is_dir():
        with place.open("rb+") as file:
            os.fsync(file.fileno())
        return
    with contextlib.suppress(OSError):  # not every file system knows this for folders
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _take_away(work: Path) -> None:
    with contextlib.suppress(OSError):
        if work.is_dir() and not work.is_symlink():
            shutil.rmtree(work, ignore_errors=True)
        else:
            work.unlink(missing_ok=True)
