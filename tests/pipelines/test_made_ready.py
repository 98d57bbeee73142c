"""Fine-tuning begins with a network that was made ready for it, once, whatever cut it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from slim_runs import QUICK, by_parameters
from torch import nn

from rmprune.config import AmcConfig, MeasureConfig, PruneConfig, SearchConfig, SlimConfig, TrainConfig
from rmprune.measure.place import Place
from rmprune.pipelines.amc import run_amc
from rmprune.pipelines.slim import run_slim
from rmprune.training import job as jobs
from rmprune.training.job import Job

SLIM = replace(QUICK, train=TrainConfig(epochs=1), finetune=TrainConfig(epochs=1))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was trained: its label, and how often it was made ready."""
    found, ready, fit = [], Job.ready, jobs.fit_together

    def marked(job: Job[Any], network: nn.Module) -> nn.Module:
        own = ready(job, network)
        own.times_ready = getattr(network, "times_ready", 0) + 1  # type: ignore[assignment]
        return own

    def noted(network: nn.Module, *rest: Any, **settings: Any) -> nn.Module:
        found.append((settings["label"], getattr(network, "times_ready", 0)))
        own = fit(network, *rest, **settings)
        own.__dict__.pop("times_ready", None)  # a copy has what it was copied from
        return own

    monkeypatch.setattr(Job, "ready", marked)
    monkeypatch.setattr(jobs, "fit_together", noted)
    return found


def test_by_methods(trained: list[tuple[str, int]], tmp_path: Path) -> None:
    methods = ("rm", "depth", "coupled", "scratch")
    prune = PruneConfig(macs_ratio=(0.8,), round_to=1)
    run_slim(replace(SLIM, model="resnet8", method=methods, prune=prune, out=tmp_path / "run"), command="x")
    assert trained == [("dense", 0), ("rm", 1), ("depth", 1), ("coupled", 1), ("scratch", 0)]


def test_by_a_plan(trained: list[tuple[str, int]], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 1, "blocks": {"layer1.0": "merge"}, "widths": {}}))
    own = replace(SLIM, method=SlimConfig.method, prune=PruneConfig(), plan=tmp_path / "plan.json")
    run_slim(replace(own, out=tmp_path / "run"), command="x")
    assert trained == [("dense", 0), ("plan", 1)]


def test_cut_again_for_its_time(
    trained: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Place, "ratios", by_parameters)
    monkeypatch.setattr(Place, "least_ratio", lambda *_: float(trained[-1:] == [("rm", 1)]))
    prune = PruneConfig(latency_ratio=(0.8,), round_to=1)
    run_slim(replace(SLIM, method=("rm",), prune=prune, out=tmp_path / "run"), command="x")
    assert trained == [("dense", 0), ("rm", 1), ("rm-again-1", 1)]


@pytest.mark.parametrize("apply", ["once", "gradual"])
def test_by_the_agent(trained: list[tuple[str, int]], apply: Any, tmp_path: Path) -> None:
    """Cut while training it begins as it was trained."""
    search = SearchConfig(episodes=2, warm_up=1, images=64, calibration=64, importance="magnitude", multiple=1)
    measure = MeasureConfig(backends=("eager",), threads=(1,), batch_sizes=(1,), seconds=0.0, min_rounds=3)
    config = AmcConfig(
        model="short_resnet", width=4, method=("rm-random",), data=QUICK.data, train=SLIM.train, finetune=SLIM.finetune,
        search=search, measure=measure, apply=apply, prune_epochs=0.5, out=tmp_path / "run",
    )  # fmt: skip
    run_amc(config, command="x")
    assert trained == [("dense", 0), ("rm-random", 1 if apply == "once" else 0)]
