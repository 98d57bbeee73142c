"""`train` from the command line and from TOML, and the networks of this family by name in the other subcommands."""

from pathlib import Path

import pytest
import torch
from marks import long
from torch import nn

import rmprune
from rmprune.cli import main
from rmprune.config import DataConfig, MeasureConfig, TrainConfig, TrainRunConfig
from rmprune.data.load import load_dataset
from rmprune.data.sources import READERS
from rmprune.errors import ConfigError
from rmprune.models.repvgg import RepVGG
from rmprune.pipelines.stages import make_dense
from rmprune.pipelines.train import run_train
from rmprune.runs import records

MEASURE = (
    "--measure.backend eager --measure.threads 1 --measure.batch-size 1 --measure.seconds 0 --measure.min-rounds 3"
)
TOML = """
model = "repvgg"
depth = 13
reserve_ratio = 0.5
width = 4
[data]
dataset = "digits"
train_images = 128
[train]
epochs = 1
[measure]
backends = ["eager"]
threads = [1]
batch_sizes = [1]
seconds = 0.0
min_rounds = 3
"""


NETWORK = "--model repvgg --depth 13 --reserve-ratio 0.5 --width 4 --dataset digits --train-images 128 --epochs 1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    main(("train", *NETWORK.split(), *MEASURE.split(), "--out", str(out)))
    return out


def test_the_record_tells_what_was_trained_and_deployed(finished: Path) -> None:
    record = records.read_record(finished)
    assert record["command"].startswith("python -m rmprune train --model repvgg --depth 13 --reserve-ratio 0.5")
    assert record["config"]["reserve_ratio"] == 0.5 and record["config"]["depth"] == 13
    assert set(records.networks(record)) == {"original", "plain"}
    assert len(record["removal"]["removed"]) == 22 and record["removal"]["kept"] == {}
    assert record["removal"]["max_error"] <= 1e-10
    assert record["plain"]["accuracy"] == pytest.approx(record["original"]["accuracy"], abs=2 / 360)
    assert record["plain"]["latency"][0]["reference"] == "original"
    assert len(record["training"]["dense"]) == 1 and record["training"]["dense"][0]["epoch"] == 1
    assert record["original"]["residuals"] and record["plain"]["residuals"] == []
    assert [layer["cout"] for layer in record["plain"]["layers"]][-1] == 10
    config = TrainRunConfig(depth=13, reserve_ratio=0.5, width=4, data=DataConfig())
    network = make_dense(config, load_dataset(config.data), 0)
    assert isinstance(network, RepVGG) and network.stages[1][1].reserved == 4
    assert record["original"]["macs"] == rmprune.count_macs(network, torch.zeros(1, 1, 8, 8))


def test_the_plain_network_and_the_figure_are_written(finished: Path) -> None:
    plain, dense = rmprune.load(finished / "plain"), rmprune.load(finished / "dense")
    assert isinstance(plain, nn.Sequential) and (finished / "plain" / "model.onnx").is_file()
    assert sum(isinstance(layer, nn.Conv2d) for layer in plain) == 13
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    expected = dense.double().eval()(x)
    assert (plain.double().eval()(x) - expected).abs().max() <= 1e-5 * expected.abs().max()  # weights stored in float32
    assert (finished / "report" / "accuracy-time.png").is_file() and (finished / "report" / "index.html").is_file()


def test_toml_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TrainRunConfig] = []
    monkeypatch.setattr("rmprune.cli._run", lambda run, config, command: asked.append(config))
    (tmp_path / "run.toml").write_text(TOML)
    for words in ((*NETWORK.split(), *MEASURE.split()), ("--config", str(tmp_path / "run.toml"))):
        main(("train", *words, "--out", str(tmp_path / "run")))
    assert asked[0] == asked[1] and asked[0].depth == 13


def test_a_finished_run_is_not_overwritten(finished: Path) -> None:
    with pytest.raises(ConfigError, match="other settings"):
        run_train(TrainRunConfig(depth=13, width=4, out=finished), command="x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "repvgg", "depth": 14}, "depth 14 is not 8n"),
        ({"model": "repvgg", "reserve_ratio": 1.5}, "reserve_ratio 1.5"),
        ({"model": "resnet8", "reserve_ratio": 0.5}, "resnet8 has no setting reserve_ratio; leave --reserve-ratio out"),
        ({"model": "rmnext50x5_32", "depth": 50}, "leave --depth out"),
    ],
)
def test_bad_settings_are_refused_before_a_file_is_written(settings: dict, message: str, tmp_path: Path) -> None:
    config = TrainRunConfig(
        **settings,
        train=TrainConfig(epochs=1),
        measure=MeasureConfig(backends=("eager",)),
        out=tmp_path / "run",
    )
    with pytest.raises(ConfigError, match=message):
        run_train(config, command="x")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_slim_takes_them_by_name(tmp_path: Path) -> None:
    flags = "--width 4 --train-images 128 --epochs 1 --finetune.epochs 1 --macs-ratio 0.5 --round-to 1 --method rm"
    main(("slim", "--model", "preact_resnet8", *flags.split(), *MEASURE.split(), "--out", str(tmp_path / "run")))
    record = records.read_record(tmp_path / "run")
    assert record["pruned"]["macs"] <= 0.5 * record["original"]["macs"] and record["removal"]["kept"] == {}
    assert isinstance(rmprune.load(tmp_path / "run" / "pruned"), nn.Sequential)


@pytest.mark.long
def test_amc_takes_them_by_name_and_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = READERS["digits"]
    monkeypatch.setitem(READERS, "digits", lambda folder: opened.append("digits") or read(folder))
    flags = (
        "--model preact_resnet8 --width 4 --train-images 128 --epochs 1 --finetune.epochs 1 --budget 0.6 --multiple 1"
    )
    search = "--episodes 2 --warm-up 1 --images 64 --calibration 16"
    main(("amc", *flags.split(), *search.split(), *MEASURE.split(), "--out", str(tmp_path / "run")))
    record = records.read_record(tmp_path / "run")
    assert record["rm-amc"]["macs"] <= 0.6 * record["original"]["macs"] and record["removal"]["kept"] == {}
    figure, page, deployed, following, again = capsys.readouterr().out.splitlines()[-5:]
    run = tmp_path / "run"
    assert (
        figure.startswith("figure: ")
        and page == f"page:   {run / 'report' / 'index.html'}"
        and deployed == f"deploy: {run / 'deploy'}"
    )
    assert following == f"next:   python {run / 'deploy' / 'predict.py'} IMAGE" and f"rmprune measure {run} " in again
    assert (run / "deploy" / "model.onnx").is_file() and len(opened) == 1  # deploying takes what is open


@pytest.mark.parametrize(
    ("network", "removed"),
    [
        long(("repvgg", "--depth", "13", "--reserve-ratio", "0.5", "--width", "4", "--image-size", "16"), 22),
        long(("rmnext41x5_16", "--width", "16", "--image-size", "16"), 14),
        (("preact_resnet8", "--width", "4"), 3),
    ],
)
def test_inspect_and_convert_take_them_by_name(
    network: tuple[str, ...], removed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(("inspect", *network))
    printed = capsys.readouterr().out
    assert printed.count("removable") == removed and "stays" not in printed.split("└")[0]
    assert all(word in printed.split("next: ")[1].split() for word in network)
    main(("convert", *network, "--num-classes", "10", "--out", str(tmp_path / "plain"), "--check"))
    printed = capsys.readouterr().out
    assert f"{removed} residuals removed, 0 kept" in printed and "ONNX Runtime differs" in printed
    assert isinstance(rmprune.load(tmp_path / "plain"), nn.Sequential)


def test_what_was_trained_goes_through_inspect_and_convert(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(("convert", str(finished / "dense"), "--out", str(tmp_path / "plain"), "--check"))
    assert "22 residuals removed, 0 kept" in capsys.readouterr().out
