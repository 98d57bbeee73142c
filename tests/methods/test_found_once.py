"""What all cuts that a search tries are made from is found once: a network is read, its channels ranked, its gradients for Torch-Pruning
computed."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from slim_runs import QUICK, by_parameters

import rmprune
import rmprune.pruning.followed as followed
from rmprune.config import PruneConfig, TrainConfig
from rmprune.data.load import load_dataset
from rmprune.measure.place import Place
from rmprune.methods import cutter
from rmprune.methods.table import METHODS
from rmprune.pipelines.slim import run_slim
from rmprune.training.job import Job


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


def test_networks_of_the_same_weights_and_groups_are_ranked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset(QUICK.data)
    torch.manual_seed(0)
    model = rmprune.models.create("resnet8", num_classes=10, in_channels=1, width=4).eval()
    job, calls, real = Job(QUICK, data, torch.device("cpu"), 0), [], cutter.score_groups

    def counting(importance: str, *given: Any) -> Any:
        calls.append(importance)
        return real(importance, *given)

    monkeypatch.setattr(cutter, "score_groups", counting)
    other = copy.deepcopy(model)
    other.conv1.weight.data[0] *= 2
    methods = [METHODS["residual"], METHODS["uniform"], METHODS["inner"]]
    cutters = [cutter.make_cutter(copy.deepcopy(model), method, job) for method in methods]
    cutters += [cutter.make_cutter(other, METHODS["residual"], job)]
    ranked = [own.scores for own in cutters]
    assert ranked[0] is ranked[1] and len(calls) == 3  # inner: fewer groups
    assert set(ranked[2]) < set(ranked[0]) and not torch.equal(ranked[0]["layer1.0.conv1"], ranked[3]["layer1.0.conv1"])
    job.scored.clear()
    again = cutter.make_cutter(other, METHODS["residual"], job).scores
    assert all(torch.equal(own, ranked[3][name]) for name, own in again.items())
