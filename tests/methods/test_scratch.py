"""`scratch`: the widest network within the budget, trained for all epochs together; where there is no width, one line."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from marks import long
from slim_runs import QUICK, by_parameters

from rmprune.config import PruneConfig, TrainConfig
from rmprune.data.load import load_dataset
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.measure.place import Place
from rmprune.methods import refuse, scratch
from rmprune.methods.refuse import NOISE
from rmprune.pipelines.slim import run_slim
from rmprune.pruning import Budget
from rmprune.runs import records
from rmprune.training.job import Job

ONE = replace(QUICK, method=("scratch",), train=TrainConfig(epochs=1), finetune=TrainConfig(epochs=1))


@pytest.mark.parametrize(
    "prune",
    [
        PruneConfig(macs_ratio=(0.5,)),
        long(PruneConfig(latency_ratio=(0.3,))),
        PruneConfig(macs_ratio=(0.9,), memory_ratio=(0.6,)),
    ],
)
def test_the_widest_within_the_budget_is_trained_for_both_budgets_of_epochs(
    prune: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Place, "ratios", by_parameters)
    record = records.read_record(run_slim(replace(ONE, prune=prune, out=tmp_path), command="x")[0])
    found, whole = record["scratch"], record["original"]
    assert found["search"]["width"] == 2.0  # of 4: a quarter of MACs and parameters; 3 is more than half
    assert found["macs"] < 0.5 * whole["macs"] and found["params"] < 0.3 * whole["params"]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["epochs"] for line in log if line["label"] == "scratch"} == {2}


@pytest.mark.parametrize(("kind", "refused"), [("macs_ratio", True), ("latency_ratio", False)])
def test_only_times_are_given_room_for_noise(kind: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrowest network costs a little more than allowed: as counted that is so, as measured it may not be."""
    monkeypatch.setattr(
        refuse, "cost_ratios", lambda budget, job, networks: dict.fromkeys(networks, 0.3 * (1 + NOISE) / 2)
    )
    job = Job(ONE, load_dataset(ONE.data), torch.device("cpu"), 0)
    with pytest.raises(InfeasibleBudget) if refused else contextlib.nullcontext():
        scratch.check_narrowest(lambda width: torch.nn.Identity(), Budget(**{kind: 0.3}), job)


def test_memory_is_a_fraction_of_what_the_budget_refers_to() -> None:
    job = Job(ONE, load_dataset(ONE.data), torch.device("cpu"), 0)
    network = torch.nn.Conv2d(1, 7, 1)  # one map of 64 numbers in, seven out
    budget = Budget(memory_ratio=0.5, reference_bytes=16 * 64 * 4)
    assert scratch.cost_ratios(budget, job, {"it": network}) == {"it": 0.5}


NO_WIDTH = [
    (
        {"model": "mobilenet_v3_small", "width": None},
        ConfigError,
        "mobilenet_v3_small .* has none; leave the method out",
    ),
    ({"weights": "imagenet", "model": "resnet18"}, ConfigError, "leave the method or --weights out"),
    ({"prune": PruneConfig(ratio=(0.5,))}, ConfigError, "use --macs-ratio"),
    ({"prune": PruneConfig(macs_ratio=(0.01,))}, InfeasibleBudget, "scratch: the narrowest network costs 0.0"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), NO_WIDTH)
def test_what_scratch_cannot_do_is_refused_before_training(
    settings: dict, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmprune.pipelines.stages.start_from", lambda *_, **__: "")
    with pytest.raises(kind, match=message):
        run_slim(replace(ONE, out=tmp_path / "run", **settings), command="x")
    assert not (tmp_path / "run").exists()
