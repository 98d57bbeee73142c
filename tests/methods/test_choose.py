"""Candidates: judged once on validation images alone; the one of the least loss goes on as its method alone would."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from slim_runs import QUICK, by_parameters, convolutions, noise, short_resnet

import rmprune
from rmprune.config import PruneConfig, TrainConfig
from rmprune.data.load import load_dataset
from rmprune.errors import ArtifactError, InfeasibleBudget, NotEquivalent, UnsupportedModel
from rmprune.measure.place import Place
from rmprune.methods.choose import Verdicts, best, judge
from rmprune.methods.cutter import Cutter, make_cutter
from rmprune.methods.start import start as starting
from rmprune.methods.table import METHODS
from rmprune.pipelines import slim
from rmprune.pipelines.slim import run_slim
from rmprune.pruning import Budget
from rmprune.runs import records
from rmprune.training import evaluate
from rmprune.training.job import Files, Job


class Counting:
    """A split that counts how often its images are loaded."""

    def __init__(self, split: Any) -> None:
        self.split, self.loss, self.loaded = split, split.loss, 0

    def batches(self, size: int, **settings: Any) -> Iterator[Any]:
        self.loaded += min(settings.get("limit") or len(self.split), len(self.split))
        return self.split.batches(size, **settings)

    def example(self, count: int, device: Any = "cpu") -> torch.Tensor:
        self.loaded += count
        return self.split.example(count, device)

    def __len__(self) -> int:
        return len(self.split)


@pytest.mark.long
def test_a_candidate_that_goes_on_is_what_its_method_alone_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = run_slim(replace(QUICK, method=("mixed-auto",), out=tmp_path / "run"), command="x")
    record = records.read_record(path)
    assert set(records.networks(record)) == {"original", "mixed-auto"} and record["removal"] is None
    found = record["mixed-auto"]
    assert set(found["candidates"]) == {"residual", "mixed-collapse", "rm-collapse", "rm"}
    monkeypatch.setattr(slim, "check_budgets", lambda *_: None)
    (path,) = run_slim(replace(QUICK, method=(found["chosen"],), out=tmp_path / "alone"), command="x")
    alone = records.read_record(path)["pruned" if found["chosen"] == "rm" else found["chosen"]]
    assert (found["accuracy"], found["macs"]) == (alone["accuracy"], alone["macs"])  # the same cut, the same epochs


@pytest.mark.long
def test_the_candidate_of_the_least_loss_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"residual": 0.5, "mixed-collapse": 0.4, "rm-collapse": 0.1, "rm": 0.2}
    monkeypatch.setattr(slim, "judge", lambda *_, **__: {name: {"loss": loss} for name, loss in losses.items()})
    monkeypatch.setattr(slim, "check_budgets", lambda *_: None)
    config = replace(QUICK, method=("mixed-auto",), train=TrainConfig(epochs=0), finetune=TrainConfig(epochs=0))
    run_slim(replace(config, out=tmp_path / "run"), command="x")
    found = records.read_record(tmp_path / "run")["mixed-auto"]
    assert found["chosen"] == "rm-collapse" and found["removal"]["max_error"] < 1e-10
    assert convolutions(rmprune.load(tmp_path / "run" / "mixed-auto")) == 3  # rm has 5


def test_candidates_are_judged_once_and_on_validation_images_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(QUICK, method=("mixed-auto",), out=tmp_path)
    data = load_dataset(config.data)
    dense = slim.make_dense(config, data, 0)
    split = Counting(data.train)
    blind = replace(data, test=None, train=split)  # type: ignore[arg-type]
    budget = Budget(macs_ratio=0.5, reference_macs=rmprune.count_macs(dense, data.train.example(1)))

    job = Job(config, blind, torch.device("cpu"), 0, teacher=dense)

    def start(name: str) -> Cutter:
        if name == "rm":
            raise UnsupportedModel("not this one")
        if name == "rm-collapse":
            raise NotEquivalent("outputs differ")
        method = METHODS[name]
        return make_cutter(starting(dense, method.start, job.examples)[0], method, job)

    def verdicts(start: Callable[[str], Cutter], label: str = "mixed-auto") -> Verdicts:
        candidates = {name: partial(start, name) for name in METHODS["mixed-auto"].candidates}
        return judge(candidates, budget, job, Files(tmp_path / "c" / "x.pt", tmp_path / "log", label))

    found = verdicts(start)
    assert found["rm"] == {"refused": "not this one"} and best(found) != "rm"
    assert found["rm-collapse"] == {"refused": "outputs differ"} and "its proof failed: outputs differ" in caplog.text
    assert split.loaded <= len(data.train) + 2 * len(found)  # besides once an example or two for each network
    cutter = make_cutter(dense, METHODS["residual"], job)
    residual = cutter.once(dense, cutter.floored(budget))
    assert found["residual"]["loss"] == pytest.approx(evaluate(residual, data.validation).loss)
    assert verdicts(lambda name: pytest.fail("judged again")) == found
    with pytest.raises(UnsupportedModel, match="no candidate of none can be had: residual: never;"):

        def never(name: str) -> Cutter:
            raise UnsupportedModel("never")

        verdicts(never, "none")
    assert not (tmp_path / "c" / "none-candidates.json").exists()
    (tmp_path / "c" / "mixed-auto-candidates.json").write_text('{"rm": ')
    with pytest.raises(ArtifactError, match=r"mixed-auto-candidates\.json: damaged"):
        verdicts(start)


@pytest.mark.long
def test_candidates_that_the_network_has_no_place_for_are_left_out(tmp_path: Path) -> None:
    config = replace(QUICK, model="preact_resnet8", train=TrainConfig(epochs=0), finetune=TrainConfig(epochs=0))
    run_slim(replace(config, method=("mixed-auto",), out=tmp_path / "run"), command="x")
    candidates = records.read_record(tmp_path / "run")["mixed-auto"]["candidates"]
    assert [name for name, verdict in candidates.items() if "loss" in verdict] == ["residual", "rm"]
    assert "no block to collapse" in candidates["rm-collapse"]["refused"]


@pytest.mark.long
def test_one_candidate_that_meets_the_budget_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "ratios", by_parameters)
    prune = PruneConfig(latency_ratio=(0.6,), min_fraction=0.9, round_to=1)
    none = TrainConfig(epochs=0)
    config = replace(
        QUICK, width=16, method=("mixed-auto",), train=none, finetune=none, prune=prune, out=tmp_path / "run"
    )
    run_slim(config, command="x")
    record = records.read_record(tmp_path / "run")
    assert "cannot be met" in record["mixed-auto"]["candidates"]["residual"]["refused"]
    assert record["mixed-auto"]["params"] <= 0.6 * record["original"]["params"]
    prune = replace(prune, latency_ratio=(0.2,))
    with pytest.raises(InfeasibleBudget, match=r"no candidate of mixed-auto can be had: residual: .*; rm: "):
        run_slim(replace(config, prune=prune, out=tmp_path / "no"), command="x")
    assert not (tmp_path / "no").exists()


def test_a_candidate_that_says_the_same_of_every_image_is_refused_and_others_go_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lively, dead = (short_resnet("", num_classes=10, in_channels=3, width=8).eval() for _ in range(2))
    torch.nn.init.zeros_(dead.fc.weight)
    job, budget = Job(QUICK, noise(), torch.device("cpu"), 0), Budget(macs_ratio=0.6)
    makes = {name: partial(make_cutter, own, METHODS["residual"], job) for name, own in (("a", dead), ("b", lively))}
    found = judge(makes, budget, job, Files.of(tmp_path, "auto"))
    assert "every score is 0" in found["a"]["refused"] and found["b"]["loss"] > 0
