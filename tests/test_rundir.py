from dataclasses import replace
from pathlib import Path

import pytest

from rmprune.config import DataConfig, PruneConfig, SlimConfig
from rmprune.errors import ArtifactError, ConfigError
from rmprune.rundir import claim, remembered, runs_of

CONFIG = SlimConfig(prune=PruneConfig(ratio=(0.5,)))
OTHER = SlimConfig(prune=PruneConfig(ratio=(0.5,)), data=DataConfig(batch_size=32))


def test_a_new_run_and_the_same_run_again(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    claim(run, CONFIG, records=[run / "record.json"], overwrite=False)
    (run / "checkpoint").mkdir()
    claim(run, CONFIG, records=[run / "record.json"], overwrite=False)  # interrupted: goes on
    assert (run / "checkpoint").is_dir()


def test_a_finished_run_is_kept_unless_told(tmp_path: Path) -> None:
    claim(tmp_path, CONFIG, records=[], overwrite=False)
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(ConfigError, match="finished"):
        claim(tmp_path, CONFIG, records=[tmp_path / "record.json"], overwrite=False)
    assert (tmp_path / "record.json").is_file()
    claim(tmp_path, CONFIG, records=[tmp_path / "record.json"], overwrite=True)
    assert not (tmp_path / "record.json").exists()


def test_overwriting_takes_away_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path, CONFIG, records=[], overwrite=False)
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "layer-times-onnxruntime-1-1.json").write_text("{}")
    for name in ("dense", "seed0", "thesis"):
        (tmp_path / name).mkdir()
    (tmp_path / "dense" / "architecture.json").write_text("{}")
    claim(tmp_path, OTHER, records=[], overwrite=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.toml", "notes.md", "thesis"}


def test_overwriting_spares_a_config_of_something_else_and_the_weights_it_starts_from(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('theme = "dark"')
    with pytest.raises(ConfigError, match="not a run of this command"):
        claim(tmp_path, CONFIG, records=[], overwrite=True)
    claim(tmp_path / "run", CONFIG, records=[], overwrite=False)
    (tmp_path / "run" / "checkpoint").mkdir()
    again = replace(CONFIG, checkpoint=tmp_path / "run" / "checkpoint" / "dense.pt")
    with pytest.raises(ConfigError, match="lies in the run"):
        claim(tmp_path / "run", again, records=[], overwrite=True)
    assert (tmp_path / "run" / "checkpoint").is_dir() and "dark" in (tmp_path / "config.toml").read_text()


def test_other_settings_are_named(tmp_path: Path) -> None:
    claim(tmp_path, CONFIG, records=[tmp_path / "record.json"], overwrite=False)
    with pytest.raises(ConfigError, match=r"data\.batch_size: 64 -> 32"):
        claim(tmp_path, OTHER, records=[tmp_path / "record.json"], overwrite=False)


def test_a_directory_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="not a run of rmprune"):
            claim(tmp_path, CONFIG, records=[], overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        claim(tmp_path / "file" / "run", CONFIG, records=[], overwrite=False)


def test_the_runs_that_records_belong_to(tmp_path: Path) -> None:
    cells = [tmp_path / "sweep" / "seed0" / name / "record.json" for name in ("a", "b")]
    alone, foreign = tmp_path / "alone" / "record.json", tmp_path / "elsewhere" / "record.json"
    for config in (tmp_path / "sweep" / "config.toml", tmp_path / "alone" / "config.toml"):
        config.parent.mkdir()
        config.write_text("")
    assert runs_of([*cells, alone, foreign]) == [tmp_path / "sweep", tmp_path / "alone"]


def test_what_was_measured_once_is_remembered(tmp_path: Path) -> None:
    values, file = iter((0.5, {"width": 0.25}, 0.125)), tmp_path / "c" / "m.json"
    for _ in range(2):
        assert [remembered(file, key, lambda: next(values)) for key in ("a", "b")] == [0.5, {"width": 0.25}]
    for damaged in ("[0.5]", '{"a": '):
        file.write_text(damaged)
        with pytest.raises(ArtifactError, match=r"m\.json: damaged"):
            remembered(file, "a", lambda: next(values))
        assert file.read_text() == damaged
