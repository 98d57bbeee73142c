"""Configs that are damaged or made to cost much: one clear error that names the file."""

import os
from pathlib import Path

import pytest

from rmprune.config import RemeasureConfig, SlimConfig
from rmprune.config.toml import from_toml
from rmprune.errors import ConfigError

TEXTS = {
    "nested lists": "model = " + "[" * 10_000 + "]" * 10_000,
    "nested tables": "model = " + "{a=" * 5_000 + "1" + "}" * 5_000,
    "a number of 5000 digits": "seed = " + "9" * 5_000,
    "a number beyond any float": "[train]\nlearning_rate = 1" + "0" * 400,
    "a key of a hundred thousand parts": "a." * 100_000 + "b = 1",
    "a number for a path": "checkpoint = 3",
    "a path with a null": 'checkpoint = "a\\u0000b"',
    "a value out of its range": "[prune]\nratio = 3.0",
    "a date": "seed = 1979-05-27",
    "a table for a number": "[seed]\na = 1",
    "more text than a config has": "# " + "x" * 300_000,
    "no text": "\udcff",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_config_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(TEXTS[name].encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"c\.toml: ") as refused:
        from_toml(SlimConfig, tmp_path / "c.toml")
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("thing", ["folder", "pipe", "device"])
def test_what_is_no_file_is_refused_unread(thing: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    if thing == "folder":
        path.mkdir()
    elif thing == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"c\.toml: .*not a regular file"):
        from_toml(SlimConfig, path)


def test_many_paths_with_dots_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f"runs = {[f'../runs/a-0.{i}/' for i in range(90)]}")
    assert len(from_toml(RemeasureConfig, tmp_path / "c.toml").runs) == 90
