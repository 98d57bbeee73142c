"""A command under torchrun: the first process does it, the others take part in its trainings, and all end together."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from marks import few
from together_processes import on_processes

from rmprune.cli import main
from rmprune.errors import DataError, InfeasibleBudget
from rmprune.training import TrainState, together

pytestmark = pytest.mark.forks
COMMON = (
    "--dataset digits --train-images 48 --batch-size 16 --device cpu --model resnet8 --width 2 --epochs 1 --sync-batch-norm "
    "--precision float32 --measure.backend eager --measure.threads 1 --measure.batch-size 1 --measure.seconds 0 "
    "--measure.min-rounds 1 --out"
)
SLIM = (
    "slim --method residual,inner --skip-infeasible --round-to 1 --macs-ratio 0.7 --gradual --cuts 2 --finetune.epochs 2 "
    f"--finetune.sync-batch-norm {COMMON}"
)


def run(command: str, out: Path) -> list[int]:
    return on_processes(lambda rank: main([*command.split(), str(out / "run")]), out)


def test_slim_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that turns out to be impossible at a cut of the first method ends its training everywhere; the next one trains on."""
    led, calls = together._Leading.__call__, []

    def refuses(self: together._Leading, state: TrainState) -> None:
        calls.append(state)
        if len(calls) == 1:
            self.hook = fails
        led(self, state)

    monkeypatch.setattr(together._Leading, "__call__", refuses)
    monkeypatch.setattr("rmprune.report.build.build_report", lambda *_: [])
    assert run(SLIM, tmp_path) == [0, 0], (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == ""  # one speaks
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (
        record["refused"] == {"residual": "as it turns out"}
        and record["inner"]["macs"] <= 0.7 * record["original"]["macs"]
    )
    assert {label: len(log) for label, log in record["training"].items()} == {"dense": 1, "inner": 2}


def fails(state: TrainState) -> None:
    raise InfeasibleBudget("as it turns out")


@pytest.mark.parametrize(
    "arguments", few(["nothing", "train --batch-size 1", "slim --macs-ratio 0.001"], "train --batch-size 1")
)
def test_what_the_first_process_refuses_ends_all(arguments: str, tmp_path: Path) -> None:
    command = arguments if arguments == "nothing" else f"{arguments} {COMMON.replace('--batch-size 16', '')}"
    assert run(command, tmp_path) == [2, 0]
    said = (tmp_path / "0.txt").read_text()
    assert said.startswith("rmprune: error: ") and said.count("\n") == 1
    assert not (tmp_path / "run").exists() and (tmp_path / "1.txt").read_text() == ""


def ends(how: str) -> None:
    """Stand in for an error of the second process in its training, or of the first one in its hook."""
    if how == "error" and os.environ["RANK"] == "1":
        raise DataError("photo 7 cannot be read")
    if how == "killed" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "loader" and os.environ["RANK"] == "1":
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    if how == "interrupted" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("how", "statuses", "says"),
    [
        ("error", [2, 2], "process 1: photo 7 cannot be read"),
        ("loader", [2, 2], "process 1: a loader process was killed"),
        ("killed", [2, -9], "another process of this run was lost; what was done is saved"),
        ("interrupted", [130, 130], "interrupted; what was done is saved. To go on: python -m rmprune train"),
    ],
)
def test_an_end_of_one_is_the_end_of_all(
    how: str, statuses: list[int], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmprune.training.loop import _Training

    step = _Training.train_step

    def broken(self: _Training, x: torch.Tensor, y: torch.Tensor) -> None:
        if self.state.step == 1:
            ends(how)
        step(self, x, y)

    monkeypatch.setattr(_Training, "train_step", broken)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert run(f"train {COMMON}", tmp_path) == statuses
    finally:
        signal.signal(signal.SIGINT, usual)
    lines = (tmp_path / "0.txt").read_text().splitlines()
    assert says in lines[-1] and not any("Traceback" in line for line in lines)
    assert (tmp_path / "1.txt").read_text() == ""
