"""Photos that are not read, or count as another class than they may seem to: the log says how many, names one, and says what to do."""

from pathlib import Path

import pytest

from rmprune.config import DataConfig
from rmprune.data.listing import list_photos


def said(root: Path, files: str, caplog: pytest.LogCaptureFixture, level: str = "WARNING") -> list[str]:
    """What the log says of a folder of these files and a photo each of two classes, where all files beside those two are looked for."""
    for name in files.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    with caplog.at_level("INFO"):
        list_photos(DataConfig("imagefolder", root))
    return [entry.getMessage() for entry in caplog.records if entry.levelname == level]


CLASSES, PARTS = "cat/0.jpg dog/0.jpg", "train/cat/0.jpg train/dog/0.jpg val/cat/0.jpg val/dog/0.jpg"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (f"{CLASSES} x.JPG y.png notes.txt", "{0}: left out: 2 photos (first: {0}/x.JPG): beside the folders of classes; put each"),
        (f"{CLASSES} cat/.old/a/0.jpg dog/.1.png ._2.png", "{0}: left out: 2 photos (first: {0}/cat/.old/a/0.jpg): hidden; rename"),
        (f"{PARTS} train/x.png", "{0}/train: left out: 1 photo (first: {0}/train/x.png): beside the folders of classes; put each"),
        (f"{PARTS} x.png .y/0.png more/cat/1.png", "{0}: left out: 3 photos (first: {0}/.y/0.png): beside train/; put each into"),
        (f"{PARTS} Test/x.png", "{0}: left out: 1 photo (first: {0}/Test/x.png): beside train/; put each into"),
    ],
)  # fmt: skip
def test_photos_that_are_not_read_are_said(
    tmp_path: Path, files: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = said(tmp_path, files, caplog)
    assert line.startswith(told.format(tmp_path))


@pytest.mark.parametrize(
    "files", [CLASSES, f"{PARTS} .DS_Store train/cat/._0.jpg __MACOSX/cat/._0.jpg .git/a README.md"]
)
def test_where_nothing_is_left_out_nothing_is_said(
    tmp_path: Path, files: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert said(tmp_path, files, caplog) == []


def test_of_folders_in_folders_the_outermost_names_the_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said(tmp_path, "2023/cat/0.jpg 2023/dog/0.jpg 2023/1.jpg 2024/cat/0.jpg", caplog, level="INFO")
    assert line.startswith(
        f"{tmp_path}: 3 photos in folders within others (first: {tmp_path}/2023/cat/0.jpg): the outer"
    )
