"""Files that settings name are known again when a run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rmprune
from rmprune.config import DataConfig, PruneConfig, SlimConfig
from rmprune.errors import ArtifactError, ConfigError
from rmprune.runs.directory import claim, refuse_used
from rmprune.runs.named import FILES, named_files

RATIO = PruneConfig(ratio=(0.5,))


def begin(config: SlimConfig, run: Path, *, overwrite: bool = False) -> None:
    refuse_used(run, config, [run / "record.json"], overwrite=overwrite)
    with claim(run, config, records=[run / "record.json"], networks=(), overwrite=overwrite):
        pass


def artifact(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    rmprune.save(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), path, overwrite=True)


def text(path: Path, seed: int) -> None:
    path.write_text(f"image,label\n{seed}.png,1\n")


KINDS: dict[str, tuple[Callable[[Path], dict[str, Any]], Callable[[Path, int], None]]] = {
    "checkpoint": (lambda path: {"checkpoint": path}, artifact),
    "weights": (lambda path: {"weights": str(path)}, text),
    "labels": (
        lambda path: {"data": DataConfig(dataset="imagefolder", data_dir=path.parent, labels=Path(path.name))},
        text,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_has_changed_since_a_run_began_is_refused(kind: str, tmp_path: Path) -> None:
    settings, write = KINDS[kind]
    file, run = tmp_path / "file", tmp_path / "run"
    write(file, 0)
    config = SlimConfig(**settings(file), prune=RATIO)
    begin(config, run)
    write(file, 0)  # with the same bytes
    begin(config, run)
    write(file, 1)
    with pytest.raises(ConfigError, match=rf"another --{kind} \({file} has changed since it began\)"):
        begin(config, run)
    file.rename(tmp_path / "moved")
    begin(config, run)  # who needs it says so
    write(file, 2)
    begin(config, run, overwrite=True)
    begin(config, run)
    (run / FILES).write_text("{")
    with pytest.raises(ArtifactError, match=r"files.json: damaged .* delete it to go on"):
        begin(config, run)
    (run / FILES).unlink()  # as a run of before has none
    begin(config, run)
    assert (run / FILES).is_file()


def test_only_files_are_known_again(tmp_path: Path) -> None:
    assert named_files(SlimConfig(weights="imagenet", prune=RATIO)) == {}
    begin(SlimConfig(weights="imagenet", prune=RATIO), tmp_path)
    assert not (tmp_path / FILES).exists()
