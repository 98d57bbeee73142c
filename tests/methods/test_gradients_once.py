"""Torch-Pruning's Taylor importance: gradients are computed once for all cuts that a search tries."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from slim_runs import QUICK, by_parameters

from rmprune.config import PruneConfig, TrainConfig
from rmprune.measure.place import Place
from rmprune.methods import cutter
from rmprune.pipelines.slim import run_slim


def test_gradients_are_computed_once_for_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = cutter.loss_gradients, []

    def counting(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(cutter, "loss_gradients", counting)
    monkeypatch.setattr("rmprune.pruning.coupled.loss_gradients", counting)
    monkeypatch.setattr(Place, "ratios", by_parameters)
    none = TrainConfig(epochs=0)
    prune = PruneConfig(latency_ratio=(0.6,), round_to=1)
    run_slim(
        replace(QUICK, method=("coupled-taylor",), train=none, finetune=none, prune=prune, out=tmp_path), command="x"
    )
    assert len(calls) == 1
