"""Settings that nothing in a run reads are known, and said in its log and record."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from slim_runs import QUICK

from rmprune.config import (
    AmcConfig,
    DataConfig,
    PruneConfig,
    RemovalConfig,
    SlimConfig,
    SparsityConfig,
    TrainConfig,
    TrainRunConfig,
)
from rmprune.data.load import load_dataset
from rmprune.pipelines.slim import run_slim
from rmprune.pipelines.stages import make_dense
from rmprune.pipelines.unread import unread
from rmprune.runs import records

SLIM = replace(
    QUICK, data=DataConfig(train_images=64, batch_size=32), finetune=TrainConfig(epochs=0),
    prune=PruneConfig(macs_ratio=(0.6,), round_to=1, reconstruct=False, importance="magnitude"),
)  # fmt: skip
FORM, EPOCHS = RemovalConfig(ranges="calibrated", form="slice"), replace(SlimConfig.train, epochs=7)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (replace(SLIM, train=SlimConfig.train, method=("residual", "coupled"), removal=FORM), {"removal.form": "method residual, coupled"}),
        (replace(SLIM, train=SlimConfig.train, method=("residual", "rm"), removal=FORM), {}),
        (replace(SLIM, train=EPOCHS, checkpoint=Path("a.pt")), {"train.epochs": "--checkpoint is trained already"}),
        (replace(SLIM, train=EPOCHS, checkpoint=Path("a.pt"), method=("scratch", "rm")), {}),
        (replace(SLIM, train=EPOCHS), {}),
        (replace(SLIM, train=SlimConfig.train, method=("rm", "uniform"), search_minutes=5.0), {"search_minutes": "does not search"}),
        (replace(SLIM, train=SlimConfig.train, method=("rm", "auto"), search_minutes=5.0), {}),
        (
            replace(SLIM, train=SlimConfig.train, checkpoint=Path("a.pt"), sparsity=SparsityConfig(0.1, shortcut_scales=True)),
            {"sparsity.strength": "trained already"},
        ),
        (AmcConfig(method=("residual-amc",), removal=FORM), {"removal.form": "residual-amc", "removal.fuse": "no residual"}),
        (AmcConfig(method=("residual-amc", "mixed-amc"), removal=FORM), {}),
        (replace(AmcConfig(checkpoint=Path("a.pt")), train=EPOCHS), {"train.epochs": "trained", "train.weight_decay": "trained"}),
        (replace(AmcConfig(checkpoint=Path("a.pt"), method=("uniform",)), train=EPOCHS), {}),
        (TrainRunConfig(train=EPOCHS), {}),
    ],
)  # fmt: skip
def test_settings_that_nothing_reads_are_known(config: Any, expected: dict[str, str]) -> None:
    found = unread(config)
    assert found.keys() == expected.keys() and all(expected[path] in found[path] for path in found)


def test_settings_that_nothing_reads_are_said_in_the_log_and_in_the_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(make_dense(SLIM, load_dataset(SLIM.data), 0).state_dict(), tmp_path / "a.pt")
    config = replace(
        SLIM, method=("residual",), removal=FORM, train=EPOCHS, checkpoint=tmp_path / "a.pt", out=tmp_path / "run"
    )
    (record,) = run_slim(config, command="x")
    said = [told.getMessage() for told in caplog.records if told.getMessage().startswith("not read")]
    assert said == [
        "not read, as method residual removes no residual: removal.form",
        "not read, as the network of --checkpoint is trained already: train.epochs",
    ]
    assert set(records.read_record(record)["unread"]) == {"removal.form", "train.epochs"}
