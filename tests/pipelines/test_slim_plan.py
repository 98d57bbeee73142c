"""A plan carried out by the command line: recorded as it was carried out, refused before anything is written."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rmprune
from rmprune.cli import main
from rmprune.pipelines import stages
from rmprune.pruning.plan import SlimPlan
from rmprune.runs import records

FLAGS = [
    *("slim", "--model", "resnet8", "--width", "4", "--train-images", "64", "--epochs", "1", "--finetune.epochs", "1"),
    *("--measure.backend", "eager", "--measure.threads", "1", "--measure.batch-size", "1"),
    *("--measure.seconds", "0", "--measure.min-rounds", "3"),
]


@pytest.mark.long
def test_a_plan_is_carried_out_and_stands_in_the_record(tmp_path: Path) -> None:
    plan = {
        "schema": 1,
        "blocks": {"layer1.0": "merge", "layer2.0": "drop"},
        "widths": {"conv1": 2, "layer3_0_conv2": 5},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    main([*FLAGS, "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "run")])
    record = records.read_record(tmp_path / "run")
    found = SlimPlan.from_dict(record["plan"]["plan"])
    assert found.blocks == {"layer1.0": "merge", "layer2.0": "drop", "layer3.0": "keep"} and found.network
    widths = {"conv1": 2, "layer1_0_conv": 4, "layer2_0_conv": 8, "layer3_0_downsample_0": 5, "layer3_0_conv1": 16}
    assert found.widths == widths and record["method"] == "plan"
    assert set(record["plan"]["collapsed"]) == {"layer1.0", "layer2.0"}
    assert record["plan"]["macs"] == rmprune.count_macs(
        rmprune.load(tmp_path / "run" / "plan"), torch.zeros(1, 1, 8, 8)
    )
    assert "budget" not in record


WRONG = [
    ('{"schema": 1, "blocks": {"layer4.0": "drop"}}', (), "there is no block layer4.0"),
    ('{"schema": 1, "widths": {"conv1": 9}}', (), "width of conv1 is 9; there are 4 to keep"),
    (
        '{"schema": 1, "widths": {"conv1": 3, "fc": 3}}',
        (),
        "there are: layer3.0.downsample.0, layer2.0.downsample.0, conv1,",
    ),
    ('{"schema": 1', (), "write it anew"),
    ("{}", ("--ratio", "0.5"), "give --plan or a budget, not both"),
    ("{}", ("--method", "coupled"), "leave out --method"),
    ("{}", ("--gradual", "--round-to", "1", "--importance", "magnitude"), "leave out --round-to, --gradual"),
    ("{}", ("--min-fraction", "0", "--rank", "importance"), "leave out --rank, --min-fraction"),
]


@pytest.mark.parametrize(("text", "more", "message"), WRONG)
def test_a_wrong_plan_is_one_line_and_nothing_is_written(
    text: str, more: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main([*FLAGS, "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "run"), *more])
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and message in said[-1] and len(said) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("importance", ["taylor", "batch_norm"])
def test_a_plan_whose_network_cannot_be_ranked_or_fitted_is_refused_before_it_is_trained(
    importance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mode = "reflect" if importance == "taylor" else "zeros"
    layers = [
        nn.Conv2d(1, 8, 3, padding=1, padding_mode=mode),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ]
    monkeypatch.setattr(stages, "create_network", lambda *_, **__: nn.Sequential(*layers))
    (tmp_path / "plan.json").write_text('{"schema": 1, "widths": {"0": 4}}')
    flags = ["--plan", str(tmp_path / "plan.json"), "--importance", importance, "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        main([*FLAGS, *flags])
    said = {"taylor": "0: fitting layers needs zero padding", "batch_norm": "no batch norm to rank its channels by"}
    assert stopped.value.code == 2 and said[importance] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
