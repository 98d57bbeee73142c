"""`depth`: the blocks that lose least go, as few as the budget asks for; where that is not enough, one line."""

from dataclasses import replace
from pathlib import Path

import pytest
from marks import long
from slim_runs import QUICK, by_parameters
from torch import nn

import rmprune
from rmprune.config import DataConfig, PruneConfig, TrainConfig
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.measure.place import Place
from rmprune.methods import depth
from rmprune.pipelines.slim import run_slim
from rmprune.runs import records

ONE = replace(QUICK, model="resnet8", method=("depth",), train=TrainConfig(epochs=1), finetune=TrainConfig(epochs=1))
ONE = replace(ONE, data=DataConfig(train_images=128))


@pytest.mark.parametrize("prune", [long(PruneConfig(macs_ratio=(0.9, 0.7))), PruneConfig(latency_ratio=(0.95,))])
def test_as_few_blocks_go_as_the_budget_asks_for(
    prune: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Place, "ratios", by_parameters)
    looked: list[nn.Module] = []
    look = depth.block_losses
    monkeypatch.setattr(depth, "block_losses", lambda network, *rest: looked.append(network) or look(network, *rest))
    run = run_slim(replace(ONE, prune=prune, out=tmp_path), command="x")[-1].parent
    assert len(looked) == 1  # for all budgets
    record = records.read_record(run)
    found, whole = record["depth"], record["original"]
    dropped, losses = found["search"]["dropped"], found["search"]["losses"]
    assert len(dropped) == (2 if prune.macs_ratio else 1)  # one fewer costs 0.72 of the MACs
    assert dropped == sorted(losses, key=losses.get)[: len(dropped)] and len(losses) == 3
    assert set(found["plan"]["blocks"]) == set(dropped)
    cost, allowed = ("macs", 0.7) if prune.macs_ratio else ("params", 0.95)
    assert found[cost] <= allowed * whole[cost]
    assert found["search"]["verified_ratio"] == pytest.approx(found[cost] / whole[cost])
    network, dense = rmprune.load(run / "depth"), rmprune.load(next(tmp_path.rglob("dense")))
    assert network.fc.weight.shape == dense.fc.weight.shape  # widths stay


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"prune": PruneConfig(macs_ratio=(0.01,))},
            InfeasibleBudget,
            "depth: without any block .* costs 0.[0-9]+ times",
        ),
        ({"prune": PruneConfig(ratio=(0.5,))}, ConfigError, "depth has no channels to remove"),
    ],
)
def test_what_depth_cannot_do_is_refused_before_training(
    settings: dict, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        run_slim(replace(ONE, out=tmp_path / "run", **settings), command="x")
    assert not (tmp_path / "run").exists()
