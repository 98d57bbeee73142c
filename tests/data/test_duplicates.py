"""Photos in two parts are counted and named; no more of them is read than it takes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rmprune.data import duplicates


def test_photos_in_two_parts_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = b"x" * duplicates.HEAD
    parts = {
        "train": [b"one", b"two!", b"two!", start + b"a", start + b"b", b"alone in size"],
        "val": [b"six", b"two!"],
        "test": [b"one", start + b"a", b"twin", b"twin"],
    }
    paths, numbers = [], {}
    for part, photos in parts.items():
        numbers[part] = range(len(paths), len(paths) + len(photos))
        for i, photo in enumerate(photos):
            paths.append(str(tmp_path / f"{part}-{i}.png"))
            Path(paths[-1]).write_bytes(photo)
    paths, numbers["val"] = [*paths, str(tmp_path / "gone.png")], [*numbers["val"], len(paths)]
    read: list[str] = []
    digest = duplicates.sha256_of
    monkeypatch.setattr(duplicates, "sha256_of", lambda path: read.append(Path(path).name) or digest(path))
    duplicates.warn_of_duplicates(paths, numbers)
    assert caplog.text.count("3 photos are in two parts") == 1 and "train-0.png = " in caplog.text
    assert not {"train-5.png", "val-0.png", "test-2.png"} & set(read)

    caplog.clear()
    monkeypatch.setattr(duplicates, "MOST_BYTES", 8)  # for those of three bytes alone
    duplicates.warn_of_duplicates(paths, numbers)
    assert "1 photo is in two parts" in caplog.text
    caplog.clear()
    monkeypatch.setattr(duplicates, "MOST_PHOTOS", 8)
    duplicates.warn_of_duplicates(paths, numbers)
    assert not caplog.text


def test_photos_in_two_classes_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of the two labels is wrong."""
    paths = [str(tmp_path / name) for name in "abcd"]
    for path, photo in zip(paths, ("one", "one", "two", "two"), strict=True):
        Path(path).write_text(photo)
    duplicates.warn_of_duplicates(paths, {"train": [0, 1, 2, 3]}, ["cat", "dog", "dog", "dog"])
    assert [entry.getMessage() for entry in caplog.records] == [
        f"1 photo is in two classes under two names, byte for byte; leave each in its own ({paths[0]} = {paths[1]})"
    ]


@pytest.mark.parametrize("look", ["_head", "sha256_of"])
@pytest.mark.parametrize("become", [Path.unlink, lambda path: path.unlink() or path.mkdir()])
def test_a_photo_that_goes_between_two_looks_is_left_to_decoding(
    look: str, become: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, real = [tmp_path / "a.png", tmp_path / "b.png"], getattr(duplicates, look)
    for path in paths:
        path.write_text("x")

    def gone(path: str) -> object:
        found = real(path)
        if Path(path) == paths[0]:
            become(paths[0])
        return found

    monkeypatch.setattr(duplicates, look, gone)
    duplicates.warn_of_duplicates(list(map(str, paths)), {"train": [0], "test": [1]})


def test_parts_that_share_none_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    duplicates.warn_of_duplicates([str(tmp_path / "a"), str(tmp_path / "b")], {"train": [0], "test": [1]})
    assert not caplog.records
