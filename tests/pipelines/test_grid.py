"""A comparison on several workers: what one loses, what is refused, what is measured, and that nothing is done twice."""

import contextlib
import fcntl
import functools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slim_runs  # noqa: F401  # it knows short_resnet
from forked_workers import Forked, import_before_forks

from rmprune.cli import main
from rmprune.config import DeployConfig, GridConfig, PruneConfig
from rmprune.errors import ArtifactError, ConfigError, RmpruneError
from rmprune.pipelines import grid, workers
from rmprune.pipelines.deploy import ranked, run_deploy
from rmprune.pipelines.grid import plan_tasks, run_grid
from rmprune.pipelines.workers import TRIES, Task, work_off, workers_of
from rmprune.runs.directory import LOCK_FILE, alone, claim
from rmprune.training.loop import _Training

GRID = (
    "grid --dataset digits --train-images 48 --batch-size 16 --device cpu --model short_resnet --width 2 --epochs 1 --finetune.epochs 2 "
    "--round-to 1 --macs-ratio 0.7 --method residual,inner --finetune.checkpoint-seconds 1e-9 --measure.backend eager "
    "--measure.threads 1 --measure.batch-size 1 --measure.seconds 0.01 --measure.min-rounds 2 --jobs 1 --out"
)


@pytest.mark.forks
def test_a_lost_worker_costs_its_own_cell_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    step = _Training.train_step

    def dies(self: _Training, *batch: Any) -> None:
        if self.label == "inner" and begun.count("inner") == 1 and self.state.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, *batch)

    def submit(function: Callable[..., object], work: Callable[..., object], *arguments: Any) -> Forked:
        begun.append(arguments[0].method[0] if work is grid.do_cell else work.__name__)
        return Forked(tmp_path / f"{len(begun)}.json", function, work, *arguments)

    import_before_forks()
    monkeypatch.setattr(_Training, "train_step", dies)
    monkeypatch.setattr(workers, "LOOK", 0.02)
    monkeypatch.setattr(grid, "workers_of", lambda config: submit)
    out = tmp_path / "run"
    main([*GRID.split(), str(out)])
    assert begun == ["share", "residual", "inner", "inner", "measure_all"]
    cells = [out / "seed0" / f"macs_ratio-0.7-{method}" for method in ("residual", "inner")]
    records = [json.loads((cell / "record.json").read_text()) for cell in cells]
    assert [record["method"] for record in records] == ["residual", "inner"]
    assert records[0]["original"]["latency"] == records[1]["original"]["latency"]  # measured in turns, at the end
    assert all(
        record["config"]["measure"]["seconds"] == 0.01 for record in records
    )  # not those that a cell measured with
    with pytest.raises(ArtifactError, match=r"not the directory of one run.*; give one of \S+/run/seed0$"):
        run_deploy(DeployConfig(out))
    assert {entry["network"] for entry in ranked(out / "seed0", None)} == {"residual", "inner", "original"}
    assert not (cells[1] / "dense").exists() and (out / "seed0" / "dense").is_dir()  # what is shared is kept once
    assert [line["epoch"] for line in records[1]["training"]["inner"]] == [1, 2]
    with pytest.raises(SystemExit):
        main([*GRID.split(), str(out)])
    assert len(begun) == 5 and (out / "report" / "index.html").is_file()


class Said:
    """A worker that is done, with what it said or how it was lost."""

    def __init__(self, said: str | Exception) -> None:
        self.said, self.cancelled = said, False

    def done(self) -> bool:
        return True

    def result(self) -> str:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said

    def cancel(self) -> None:
        self.cancelled = True


def test_what_cannot_be_had_is_said_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK", 0.0)
    first, other = (Task(name, print, (name,), (tmp_path / name,)) for name in ("first", "other"))
    tasks = [first, Task("of first", print, ("of first",), (tmp_path / "f",), first), other]
    tasks.append(Task("of other", print, ("of other",), (tmp_path / "o",), other))
    begun: list[str] = []

    def submit(function: object, work: object, name: str) -> Said:
        begun.append(name)
        if name == "first":
            return Said(RuntimeError("no result"))
        (tmp_path / name).touch()
        return Said("the budget cannot be met" if name == "of other" else "")

    refused = work_off(tasks, submit, 2)
    assert refused == {
        "first": "no result", "of first": "first could not be had", "of other": "the budget cannot be met"
    }  # fmt: skip
    assert begun.count("first") == TRIES and begun.count("other") == 1 and "of first" not in begun


def test_ctrl_c_stops_the_workers(tmp_path: Path) -> None:
    workers: list[Said] = []

    def submit(*_: object) -> Said:
        if workers:
            raise KeyboardInterrupt
        workers.append(Said(""))
        return workers[0]

    with pytest.raises(KeyboardInterrupt):
        work_off([Task(str(n), print, (), (tmp_path / str(n),)) for n in range(2)], submit, 2)
    assert workers[0].cancelled


def config(out: Path, **settings: Any) -> GridConfig:
    return GridConfig(**{"prune": PruneConfig(macs_ratio=(0.5, 0.25)), "out": out} | settings)


def test_cells_are_runs_of_slim(tmp_path: Path) -> None:
    tasks = plan_tasks(config(tmp_path, method=("rm", "inner"), seeds=2), "as asked")
    assert len(tasks) == 2 * (1 + 2 * 2)
    own, cell, _ = tasks[-1].arguments
    assert (own.seed, own.seeds, own.method, own.prune.budgets) == (1, 1, ("inner",), [("macs_ratio", 0.25)])
    assert type(own).__name__ == "SlimConfig" and own.directory == cell.directory and cell.shared == tmp_path / "seed1"


def test_a_cell_starts_from_no_other_weights_than_what_it_shares(tmp_path: Path) -> None:
    weights = tmp_path / "own.pt"
    weights.write_text("of before")
    (own, *_), arguments = (task.arguments for task in plan_tasks(config(tmp_path, weights=str(weights)), "")[:2])
    with claim(own.directory, own, records=[], networks=(), overwrite=False):
        pass
    weights.write_text("of now")
    with pytest.raises(ConfigError, match=r"another --weights \(.*own.pt has changed"):
        grid.do_cell(*arguments)


def test_cells_of_other_settings_than_what_they_share_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = config(tmp_path / "run", method=("rm",), prune=PruneConfig(macs_ratio=(0.5,)))
    own, *_ = plan_tasks(begun, "")[0].arguments
    with claim(own.directory, own, records=[], networks=(), overwrite=False):
        pass
    asked: list[Task] = []
    monkeypatch.setattr(grid, "work_off", lambda tasks, *_: asked.extend(tasks) or {})
    monkeypatch.setattr(grid, "_open", lambda _: None)
    data = replace(begun.data, batch_size=7)
    for settings, says in (
        ({"data": data}, "data.batch_size: 64 -> 7"),
        ({"prune": replace(begun.prune, round_to=3)}, "prune.round_to: . -> 3"),
    ):
        with pytest.raises(ConfigError, match=f"run/seed0: what its cells share .*{says}.*; give these to go on"):
            run_grid(replace(begun, **settings), command="")
    assert not asked
    more = replace(begun, method=("rm", "inner"), prune=replace(begun.prune, macs_ratio=(0.5, 0.25)))
    with pytest.raises(RmpruneError, match="no cell can be had"):  # which were asked for
        run_grid(more, command="")
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({"memory_ratio": (0.5,)}, "prune.memory_ratio: (0.8,) -> (0.5,)"),
        ({"macs_ratio": (0.6000001,)}, "prune.macs_ratio: (0.6,) -> (0.6000001,)"),
        ({}, ""),
    ],
)
def test_a_cell_counts_as_done_only_with_its_own_settings(now: dict[str, Any], says: str, tmp_path: Path) -> None:
    prune = PruneConfig(macs_ratio=(0.6,), memory_ratio=(0.8,))
    begun = config(tmp_path / "run", method=("rm",), prune=prune)
    for task in plan_tasks(begun, ""):
        with claim(task.arguments[0].directory, task.arguments[0], records=[], networks=(), overwrite=False):
            task.files[0].parent.mkdir(exist_ok=True)
            task.files[0].touch()
    tasks = plan_tasks(replace(begun, prune=replace(prune, **now)), "")
    refused = pytest.raises(ConfigError, match=rf"0\.6-rm: this cell .*{re.escape(says)}.*another --out")
    with refused if says else contextlib.nullcontext():
        grid._refuse_mixed(tasks)


def test_what_cells_share_takes_methods_and_budgets_that_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "dense_network", lambda *_: None)
    monkeypatch.setattr(grid, "refuse_early", lambda *_: None)
    made: list[str] = []
    monkeypatch.setattr(grid, "starts_of", lambda *_: made.append)
    first = config(tmp_path, method=("rm",), prune=PruneConfig(macs_ratio=(0.5,)))
    prune = PruneConfig(latency_ratio=(0.3,), memory_ratio=(0.8,))
    later = replace(first, method=("rm", "auto", "mixed-collapse"), choices=("keep", "drop"), prune=prune)
    for asked in (first, later, first):
        tasks = plan_tasks(asked, "")
        grid._refuse_mixed(tasks)
        grid.share(*tasks[0].arguments)
    assert made == ["plain", "dense", "half-collapsed", "plain", "plain"]
    other = plan_tasks(replace(first, train=replace(first.train, epochs=3)), "")
    with pytest.raises(ConfigError, match=r"other settings \(train.epochs: 25 -> 3\)"):
        grid.share(*other[0].arguments)


def test_only_the_cells_of_a_search_have_its_settings(tmp_path: Path) -> None:
    asked = config(
        tmp_path,
        method=("rm", "auto"),
        search_minutes=3.0,
        choices=("keep", "drop"),
        prune=PruneConfig(macs_ratio=(0.5,)),
    )
    found = [(own.search_minutes, own.choices) for own, *_ in (task.arguments for task in plan_tasks(asked, "")[1:])]
    assert found == [(None, ()), (3.0, ("keep", "drop"))]


def test_a_cell_keeps_the_budget_of_memory_beside_its_own_and_the_time_for_measuring(tmp_path: Path) -> None:
    settings = config(tmp_path, method=("rm",), prune=PruneConfig(macs_ratio=(0.5,), memory_ratio=(0.7,)))
    own, cell = plan_tasks(settings, "")[1].arguments[:2]
    assert cell.budget == {"macs_ratio": 0.5, "memory_ratio": 0.7} and own.measure == settings.measure


def test_a_cell_waits_for_a_worker_that_outlived_its_grid(tmp_path: Path) -> None:
    _, cell = plan_tasks(config(tmp_path, method=("inner",), prune=PruneConfig(macs_ratio=(0.5,))), "")
    own = cell.arguments[0]
    own.directory.mkdir(parents=True)
    claimed = functools.partial(claim, own.directory, own, records=[tmp_path / "no"], networks=(), overwrite=False)
    held = (own.directory / LOCK_FILE).open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    for held_by_another in (claimed(), alone(own.directory)):
        with pytest.raises(ConfigError, match="another process is at this run"), held_by_another:
            pass
    threading.Timer(0.2, held.close).start()
    with claimed(wait=True):
        assert held.closed


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prune": PruneConfig(latency_ratio=(0.5,))}, "latency_ratio: decided by measured times"),
        ({"method": ("mixed",)}, "mixed: decided by measured times"),
        ({"overwrite": True}, "never overwritten"),
        ({"cluster": "slurm"}, "slurm: "),
    ],
)
def test_what_is_no_grid_is_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        run_grid(config(tmp_path / "run", **settings), command="")
    assert not (tmp_path / "run" / "seed0").exists()


def test_a_grid_under_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start grid by itself"):
        run_grid(config(tmp_path / "run"), command="")


@pytest.mark.long
def test_no_cell_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK", 0.0)
    with pytest.raises(RmpruneError, match="no cell can be had: the data are gone; seed 0 could not be had"):
        run_grid(config(tmp_path), command="", submit=lambda *_: Said("the data are gone"))


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"file: cannot be written \(Not a directory\); choose another --out"):
        workers_of(config(tmp_path / "file"))


@pytest.mark.long
def test_submitit_says_which_worker_was_lost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    submit = workers_of(config(tmp_path, jobs=1))
    well, lost = submit(len, "abc"), submit(time.sleep, 60)
    assert well.result() == 3
    children = lambda pid: Path(f"/proc/{pid}/task/{pid}/children").read_text().split()  # noqa: E731
    controller = int(lost.job_id)  # type: ignore[attr-defined]
    while not (found := children(controller)):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(int(found[0]), signal.SIGKILL)
    lost._results_timeout_s = 0  # type: ignore[attr-defined]  # how long it waits for a file that will not come
    while not lost.done():
        time.sleep(0.05)
    with pytest.raises(Exception, match=r"(?s)job|Job"):
        lost.result()
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    stopped = submit(time.sleep, 60)
    signal.signal(signal.SIGINT, usual)
    time.sleep(0.5)
    stopped.cancel()
    while not stopped.done():
        time.sleep(0.05)
    assert capfd.readouterr().err == ""
