import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rmprune.config import DataConfig, PruneConfig, SlimConfig
from rmprune.errors import ArtifactError, ConfigError, RmpruneError
from rmprune.runs import directory
from rmprune.runs.directory import claim, refuse_used, runs_of

CONFIG = SlimConfig(prune=PruneConfig(ratio=(0.5,)))


OTHER = SlimConfig(prune=PruneConfig(ratio=(0.5,)), data=DataConfig(batch_size=32))


def begin(directory: Path, config: SlimConfig, *, records: list[Path], overwrite: bool) -> None:
    with claim(directory, config, records=records, networks={"dense"}, overwrite=overwrite):
        pass


def test_a_new_run_and_the_same_run_again(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    begin(run, CONFIG, records=[run / "record.json"], overwrite=False)
    (run / "checkpoint").mkdir()
    begin(run, CONFIG, records=[run / "record.json"], overwrite=False)  # interrupted: goes on
    assert (run / "checkpoint").is_dir()


def test_a_plan_whose_text_has_changed_is_another_run(tmp_path: Path) -> None:
    plan, run = tmp_path / "own.json", tmp_path / "run"
    config = SlimConfig(plan=plan)
    plan.write_text('{"schema": 1, "blocks": {"layer1.0": "drop"}}')
    begin(run, config, records=[run / "record.json"], overwrite=False)
    plan.write_text('{"blocks": {"layer1.0": "drop"},\n"schema": 1}')
    begin(run, config, records=[run / "record.json"], overwrite=False)  # in other words the same
    plan.write_text('{"schema": 1, "blocks": {"layer1.0": "merge"}}')
    for check in (begin, refuse_used):
        with pytest.raises(
            ConfigError, match=r"own.json has changed since it began\); to go on copy .*run/plan.json over it"
        ):
            check(run, config, records=[run / "record.json"], overwrite=False)
    begin(run, config, records=[run / "record.json"], overwrite=True)
    begin(run, config, records=[run / "record.json"], overwrite=False)


def test_a_run_that_ended_while_its_plan_was_kept_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, run, write = tmp_path / "own.json", tmp_path / "run", directory.write_text
    plan.write_text('{"schema": 1, "blocks": {"layer1.0": "drop"}}')
    for killed in ("plan.json", "config.toml"):

        def ends(path: Path, text: str, killed: str = killed) -> None:
            if path.name == killed:
                raise KeyboardInterrupt
            write(path, text)

        monkeypatch.setattr(directory, "write_text", ends)
        with pytest.raises(KeyboardInterrupt):
            begin(run, SlimConfig(plan=plan), records=[], overwrite=False)
        monkeypatch.setattr(directory, "write_text", write)
        begin(run, SlimConfig(plan=plan), records=[run / "record.json"], overwrite=False)
        assert (run / "plan.json").read_text() == plan.read_text()
        run = tmp_path / "other"


def test_a_finished_run_is_kept_unless_told(tmp_path: Path) -> None:
    begin(tmp_path, CONFIG, records=[], overwrite=False)
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(ConfigError, match="finished"):
        begin(tmp_path, CONFIG, records=[tmp_path / "record.json"], overwrite=False)
    assert (tmp_path / "record.json").is_file()
    begin(tmp_path, CONFIG, records=[tmp_path / "record.json"], overwrite=True)
    assert not (tmp_path / "record.json").exists()


def test_overwriting_takes_away_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    begin(tmp_path, CONFIG, records=[], overwrite=False)
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "layer-times-onnxruntime-1-1.json").write_text("{}")
    for name in ("dense", "seed0", "thesis"):
        (tmp_path / name).mkdir()
    for name in ("dense", "thesis"):  # an artifact of the run, and one that somebody put there
        (tmp_path / name / "architecture.json").write_text("{}")
    begin(tmp_path, OTHER, records=[], overwrite=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {".lock", "config.toml", "notes.md", "thesis"}


def test_overwriting_spares_a_config_of_something_else_and_the_weights_it_starts_from(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('theme = "dark"')
    with pytest.raises(ConfigError, match="not a run of this command"):
        begin(tmp_path, CONFIG, records=[], overwrite=True)
    begin(tmp_path / "run", CONFIG, records=[], overwrite=False)
    (tmp_path / "run" / "checkpoint").mkdir()
    plan = SlimConfig(plan=tmp_path / "run" / "record.json")
    for again in (replace(CONFIG, checkpoint=tmp_path / "run" / "checkpoint" / "dense.pt"), plan):
        with pytest.raises(ConfigError, match="lies in the run"):
            begin(tmp_path / "run", again, records=[], overwrite=True)
    assert (tmp_path / "run" / "checkpoint").is_dir() and "dark" in (tmp_path / "config.toml").read_text()


def test_other_settings_are_named(tmp_path: Path) -> None:
    begin(tmp_path, CONFIG, records=[tmp_path / "record.json"], overwrite=False)
    with pytest.raises(ConfigError, match=r"data\.batch_size: 64 -> 32"):
        begin(tmp_path, OTHER, records=[tmp_path / "record.json"], overwrite=False)


@pytest.mark.parametrize("bad", ["gone", "a folder", "no JSON", "within"])
def test_overwriting_takes_nothing_away_where_the_plan_cannot_be_had(tmp_path: Path, bad: str) -> None:
    plan, run = tmp_path / "own.json", tmp_path / "run"
    plan.write_text('{"schema": 1}')
    begin(run, SlimConfig(plan=plan), records=[], overwrite=False)
    (run / "dense").mkdir()
    before = sorted(path.name for path in run.iterdir())
    plan.unlink()
    if bad == "a folder":
        plan.mkdir()
    elif bad == "no JSON":
        plan.write_text("{")
    elif bad == "within":
        plan = run / "plan.json"
    with pytest.raises(RmpruneError) as said:
        begin(run, SlimConfig(plan=plan), records=[], overwrite=True)
    assert str(plan) in str(said.value) and "written" not in str(said.value) and "\n" not in str(said.value)
    assert sorted(path.name for path in run.iterdir()) == before
    if bad == "within":  # before anything that takes long
        with pytest.raises(ConfigError, match="lies in the run"):
            refuse_used(run, SlimConfig(plan=plan), records=[], overwrite=True)


def test_settings_that_change_no_network_may_change(tmp_path: Path) -> None:
    begin(tmp_path, CONFIG, records=[tmp_path / "record.json"], overwrite=False)
    more = replace(CONFIG, data=DataConfig(workers=8), train=replace(CONFIG.train, checkpoint_seconds=9.0))
    begin(tmp_path, more, records=[tmp_path / "record.json"], overwrite=False)


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path: Path) -> None:
    unfinished = [tmp_path / "record.json"]
    begin(tmp_path, CONFIG, records=unfinished, overwrite=False)
    (tmp_path / "dense").mkdir()
    code = f"import filelock; lock = filelock.FileLock({str(tmp_path / '.lock')!r}); lock.acquire(); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="another process"):
                begin(tmp_path, CONFIG, records=unfinished, overwrite=overwrite)
        other.communicate("go\n", timeout=60)
    assert (tmp_path / "dense").is_dir()
    begin(tmp_path, CONFIG, records=unfinished, overwrite=False)


def test_a_directory_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="not a run of rmprune"):
            begin(tmp_path, CONFIG, records=[], overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        begin(tmp_path / "file" / "run", CONFIG, records=[], overwrite=False)


def test_the_runs_that_records_belong_to(tmp_path: Path) -> None:
    cells = [tmp_path / "sweep" / "seed0" / name / "record.json" for name in ("a", "b")]
    alone, foreign = tmp_path / "alone" / "record.json", tmp_path / "elsewhere" / "record.json"
    for config in (tmp_path / "sweep" / "config.toml", tmp_path / "alone" / "config.toml"):
        config.parent.mkdir()
        config.write_text("")
    assert runs_of([*cells, alone, foreign]) == [tmp_path / "sweep", tmp_path / "alone"]
