"""What all cuts that a search tries are made from is found once: a network is read, its channels ranked, its gradients for Torch-Pruning
computed."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from slim_runs import QUICK, by_parameters
from torch import nn

import rmprune
import rmprune.pruning.prunable as prunable
from rmprune.config import PruneConfig, TrainConfig
from rmprune.data.load import load_dataset
from rmprune.measure.place import Place
from rmprune.methods import cutter
from rmprune.methods.table import METHODS
from rmprune.pipelines.slim import run_slim
from rmprune.pruning import find_structure
from rmprune.pruning.collapse import shorten_blocks
from rmprune.training.job import Job


@pytest.mark.long
def test_a_search_reads_and_computes_gradients_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = cutter.loss_gradients, []

    def counting(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(cutter, "loss_gradients", counting)
    monkeypatch.setattr("rmprune.pruning.coupled.loss_gradients", counting)
    read, readings = prunable.read, []

    def reading(*args: Any, **settings: Any) -> Any:
        readings.append(settings)
        return read(*args, **settings)

    monkeypatch.setattr(prunable, "read", reading)
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


class Pooled(nn.Module):
    """A residual block without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.pool(x)


def test_networks_of_the_same_weights_and_other_code_are_ranked_apart() -> None:
    """What is left of two blocks without weights, the one dropped or the other; state that is no tensor is no obstacle."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)]
    convs[0].get_extra_state = lambda: {"calls": 3}  # type: ignore[method-assign]
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    model = nn.Sequential(
        convs[0], nn.ReLU(), Pooled(), convs[1], nn.ReLU(), Pooled(), convs[2], nn.ReLU(), *end
    ).eval()
    job, found = Job(QUICK, load_dataset(QUICK.data), torch.device("cpu"), 0), []
    images = job.data.train.example(2)
    for network in (model, *(shorten_blocks(model, images, drop=[block]).model for block in ("2", "5"))):
        found.append(cutter.job_scores(job, network, find_structure(network, images), "taylor"))
    assert len(job.scored) == 3 and not torch.equal(found[1]["3"], found[2]["3"])
