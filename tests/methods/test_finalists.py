"""The last round of a search: a few candidates that are unlike each other begin their fine-tuning, and the best of them goes on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from slim_runs import QUICK

import rmprune
from rmprune.config import PruneConfig, SlimConfig, TrainConfig
from rmprune.errors import Diverged
from rmprune.methods import auto, finalists
from rmprune.pipelines.slim import run_slim
from rmprune.runs import records


def test_finalists_are_the_best_that_are_unlike_each_other() -> None:
    blocks: dict[str, dict[str, Any]] = {
        "residual": {"1": "keep", "2": "keep", "3": "keep"},
        "uniform": {"1": "keep", "2": "keep", "3": "keep"},
        "plan-1": {"1": "keep", "2": "merge", "3": "keep"},
        "plan-2": {"1": "drop", "2": "drop", "3": "keep"},
        "plan-3": {"1": "merge", "2": "merge", "3": "merge"},
        "rm": {"1": "remove", "2": "remove", "3": "remove"},
    }
    losses = {"rm": 0.9, "residual": 0.3, "uniform": 0.2, "plan-1": 0.4, "plan-2": 0.1, "plan-3": 0.5}
    verdicts = {name: {"loss": loss} for name, loss in losses.items()} | {"rm-v1": {"refused": "no"}}
    assert finalists.finalists(verdicts, blocks) == ["plan-2", "uniform", "plan-1", "plan-3"]
    nine = {name: {f"{b}.{n}": c for b, c in own.items() for n in range(3)} for name, own in blocks.items()}
    nine["plan-4"] = nine["uniform"] | {"1.0": "drop", "1.1": "drop"}  # two of nine: not unlike enough
    verdicts["plan-4"] = {"loss": 0.25}
    assert finalists.finalists(verdicts, nine) == ["plan-2", "uniform", "plan-1", "plan-3"]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> SlimConfig:
    monkeypatch.setattr(auto, "PROPOSED", 1)
    monkeypatch.setattr(auto, "PRESETS", {name: auto.PRESETS[name] for name in ("residual", "rm-collapse")})
    tuning = TrainConfig(epochs=2, learning_rate=0.02, distillation=0.5)
    return replace(
        QUICK, method=("auto",), prune=PruneConfig(macs_ratio=(0.5,), round_to=1), train=TrainConfig(epochs=1), finetune=tuning,
        search_minutes=0.0,
    )  # fmt: skip


def epochs(run: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        if "epoch" in line and line["label"].startswith("auto-"):
            found.setdefault(line["label"], []).append(line["epoch"])
    return found


def test_the_best_after_the_first_epochs_goes_on_from_there(
    config: SlimConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order of losses that is not that before fine-tuning; an interruption between two of them; the network as if none had been."""
    begin, begun = finalists.begin, []
    took: list[float] = []

    def worse_for_the_first(*given: Any) -> float:
        took.append(json.loads((tmp_path / "run" / "checkpoint" / "auto-plans.json").read_text())["took"])
        if len(begun) == 1 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        begun.append(given[4].label)
        return begin(*given) + 10 * (len(begun) == 1)

    monkeypatch.setattr(finalists, "begin", worse_for_the_first)
    with pytest.raises(KeyboardInterrupt):
        run_slim(replace(config, out=tmp_path / "run"), command="x")
    (path,) = run_slim(replace(config, out=tmp_path / "run"), command="x")
    found = records.read_record(path)["pruned"]
    tried = {name: verdict for name, verdict in found["candidates"].items() if "begun" in verdict}
    first, *others = sorted(tried, key=lambda name: tried[name]["loss"])
    assert took[0] < took[1] <= took[-1] < found["search"]["seconds"]  # what an interrupted command took counts, too
    assert others and begun == [f"auto-{name}" for name in (first, *others)]
    assert found["chosen"] == min(others, key=lambda name: tried[name]["begun"]) != first
    every = epochs(tmp_path / "run")
    assert every == {f"auto-{name}": [1, 2] if name == found["chosen"] else [1] for name in tried}
    left = {file.stem for file in (tmp_path / "run" / "checkpoint").glob("auto-*.pt")}
    assert left <= {f"auto-{found['chosen']}"}  # the others' are gone

    pruned, config = rmprune.load(path.parent / "pruned"), replace(config, out=tmp_path / "alone")
    monkeypatch.setattr(auto, "begin_best", lambda verdicts, *_: {found["chosen"]: verdicts[found["chosen"]]})
    (path,) = run_slim(config, command="x")
    assert epochs(tmp_path / "alone") == {f"auto-{found['chosen']}": [1, 2]}
    whole = rmprune.load(path.parent / "pruned").state_dict()
    assert all((value == whole[name]).all() for name, value in pruned.state_dict().items())


def test_one_that_diverges_does_not_go_on(config: SlimConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, begun = finalists.begin, []

    def diverges(*given: Any) -> float:
        begun.append(given[4].label)
        if len(begun) == 1:
            raise Diverged("the loss is no longer finite")
        return begin(*given)

    monkeypatch.setattr(finalists, "begin", diverges)
    (path,) = run_slim(replace(config, out=tmp_path), command="x")
    found = records.read_record(path)["pruned"]
    assert len(begun) > 1 and found["candidates"][begun[0].removeprefix("auto-")]["begun"] is None
    assert found["chosen"] != begun[0].removeprefix("auto-")


def test_nothing_is_begun_without_fine_tuning(
    config: SlimConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finalists, "begin", lambda *_: pytest.fail("begun"))
    (path,) = run_slim(replace(config, finetune=TrainConfig(epochs=0), out=tmp_path), command="x")
    found = records.read_record(path)["pruned"]
    losses = {name: verdict["loss"] for name, verdict in found["candidates"].items() if "loss" in verdict}
    assert found["chosen"] == min(losses, key=lambda name: losses[name])
