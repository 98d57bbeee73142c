"""What all cuts that a search tries are made from is found once: a network is read, its gradients for Torch-Pruning computed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from slim_runs import QUICK, by_parameters

import rmprune.pruning.followed as followed
from rmprune.config import PruneConfig, TrainConfig
from rmprune.measure.place import Place
from rmprune.methods import cutter
from rmprune.pipelines.slim import run_slim


def test_a_search_reads_and_computes_gradients_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = cutter.loss_gradients, []

    def counting(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(cutter, "loss_gradients", counting)
    monkeypatch.setattr("rmprune.pruning.coupled.loss_gradients", counting)
    read, readings = followed.read, []

    def reading(*args: Any, **settings: Any) -> Any:
        readings.append(settings)
        return read(*args, **settings)

    monkeypatch.setattr(followed, "read", reading)
    monkeypatch.setattr(Place, "ratios", by_parameters)
    none = TrainConfig(epochs=0)
    prune = PruneConfig(latency_ratio=(0.6,), round_to=1)
    run_slim(
        replace(QUICK, method=("coupled-taylor", "residual"), train=none, finetune=none, prune=prune, out=tmp_path),
        command="x",
    )
    assert len(calls) == 1 and sum(settings["values"] for settings in readings) == 1
