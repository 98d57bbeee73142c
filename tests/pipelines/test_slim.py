"""The whole job on the digits, in miniature: one record, what was measured is what is kept, interrupted runs go on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from slim_runs import ON_BOTH_BACKENDS as QUICK
from slim_runs import by_parameters

import rmprune
from rmprune.cli import main
from rmprune.config import MeasureConfig, NetworkConfig, PruneConfig, RemeasureConfig, TrainConfig
from rmprune.errors import ArtifactError, ConfigError
from rmprune.measure.place import Place
from rmprune.methods.table import find_methods
from rmprune.pipelines import slim, stages
from rmprune.pipelines.convert import open_network
from rmprune.pipelines.deploy import ranked
from rmprune.pipelines.measure import run_measure
from rmprune.pipelines.slim import run_slim
from rmprune.report.build import build_report
from rmprune.report.tables import budget_of
from rmprune.runs import records
from rmprune.training.job import Job


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run_slim(replace(QUICK, out=out), command="python -m rmprune slim")
    return out


def test_the_record_says_what_was_promised(finished: Path) -> None:
    record = records.read_record(finished)
    assert record["removal"]["removed"] == ["layer1.0", "layer2.0"] and record["removal"]["kept"] == {}
    assert record["removal"]["max_error"] < 1e-10
    assert set(records.networks(record)) == {"original", "plain", "pruned", "coupled"}
    for name in ("pruned", "coupled"):
        assert 0 < record[name]["macs"] <= 0.5 * record["original"]["macs"]
    assert record["plain"]["accuracy"] == pytest.approx(record["original"]["accuracy"], abs=2 / 360)
    assert {time["backend"] for time in record["pruned"]["latency"]} == {"eager", "onnxruntime"}


def test_artifacts_are_what_was_measured(finished: Path) -> None:
    pruned = rmprune.load(finished / "pruned")
    assert isinstance(pruned, torch.nn.Sequential) and (finished / "pruned" / "model.onnx").is_file()
    record = records.read_record(finished)
    assert rmprune.count_macs(pruned, torch.zeros(1, 1, 8, 8)) == record["pruned"]["macs"]
    assert rmprune.count_params(pruned) == record["pruned"]["params"]


def test_a_finished_run_is_not_overwritten(finished: Path) -> None:
    before = (finished / "record.json").read_bytes()
    with pytest.raises(ConfigError, match="finished"):
        run_slim(replace(QUICK, out=finished), command="x")
    with pytest.raises(ConfigError, match="other settings"):
        run_slim(replace(QUICK, out=finished, seed=5), command="x")
    assert (finished / "record.json").read_bytes() == before


@pytest.mark.long
def test_an_interrupted_run_goes_on_to_the_same_result(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, config = stages.tune, replace(QUICK, method=("rm",), out=tmp_path / "run")

    def interrupted(*args: object, **kwargs: object) -> torch.nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setattr("rmprune.methods.slim.tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_slim(config, command="x")
    assert (config.out / "dense").is_dir() and not (config.out / "record.json").exists()
    monkeypatch.setattr("rmprune.methods.slim.tune", real)
    run_slim(config, command="x")
    first, second = (json.loads((run / "record.json").read_text()) for run in (finished, config.out))
    for name in ("original", "plain", "pruned"):
        assert first[name]["accuracy"] == second[name]["accuracy"] and first[name]["macs"] == second[name]["macs"]


@pytest.mark.long
def test_measuring_again_takes_ratios_to_each_run_s_own_original(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="rmprune")
    wider = tmp_path / "wider"
    settings = replace(QUICK, out=wider, width=8, method=("rm",), train=TrainConfig(epochs=0))
    run_slim(replace(settings, finetune=TrainConfig(epochs=0)), command="x")
    record = records.read_record(wider)
    assert record["pruned"]["macs"] <= 0.5 * record["original"]["macs"]  # cut although there was nothing to train
    narrow = [shutil.copytree(finished, tmp_path / name) for name in ("narrow", "copy")]
    quick = MeasureConfig(backends=("eager",), threads=(1,), batch_sizes=(2,), seconds=0.02, min_rounds=3)
    paths = run_measure(RemeasureConfig((*narrow, wider), quick))
    counts = {len(records.networks(records.read_record(run))) for run in (wider, finished)}
    assert f"measuring {sum(counts)} networks, eager, 1 thread, batch 2: 1 of 1" in caplog.text  # copies once
    for again in map(records.read_record, paths):
        assert [time["batch_size"] for time in again["pruned"]["latency"]] == [2]
        assert again["original"]["latency"][0]["ratio"] == 1
        assert again["pruned"]["latency"][0]["reference"] == "original"
    assert record["pruned"]["accuracy"] == records.read_record(wider)["pruned"]["accuracy"]


@pytest.mark.long
def test_measure_renews_the_report_and_names_the_next_command(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    build_report(run, run / "report", "x")
    flags = "--backend eager --threads 1 --batch-size 4 --seconds 0 --min-rounds 3"
    main(("measure", str(run), *flags.split()))
    printed = capsys.readouterr().out
    assert f"figure: {run / 'report' / 'accuracy-time.png'}" in printed.replace("\n", "")
    assert f"python -m rmprune report {run} --out reports" in printed
    assert [time["batch_size"] for time in records.read_record(run)["pruned"]["latency"]] == [4]


def test_networks_of_a_run_say_the_size_of_their_images(finished: Path) -> None:
    for name in ("dense", "plain", "pruned"):
        assert open_network(NetworkConfig(str(finished / name)))[1].shape[1:] == (1, 8, 8)
    assert open_network(NetworkConfig(str(finished / "dense"), image_size=12, in_channels=1))[1].shape[1:] == (
        1,
        12,
        12,
    )


def test_a_damaged_stage_is_refused_before_it_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "architecture.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        slim.stage(tmp_path / "dense", lambda: pytest.fail("trained for nothing"))


@pytest.mark.long
def test_a_budget_of_memory_is_met_by_methods_of_ours_and_refused_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none, one = TrainConfig(epochs=0), MeasureConfig(("eager",), (1,), (1,), seconds=0.0, min_rounds=3)
    budget = PruneConfig(memory_ratio=(0.7,), round_to=1, importance="magnitude", reconstruct=False)
    config = replace(QUICK, out=tmp_path / "run", width=8, train=none, finetune=none, measure=one)
    both = replace(budget, macs_ratio=(0.5,))
    with pytest.raises(ConfigError, match=r"memory_ratio has 2 values; beside macs_ratio give one"):
        replace(both, memory_ratio=(0.5, 0.6))
    refused = [("coupled", both), ("rm", replace(both, gradual=True)), ("auto", budget)]
    for method, settings in refused:
        with pytest.raises(ConfigError, match="memory_ratio is met by one cut of ours"):
            run_slim(replace(config, method=(method,), prune=settings, finetune=TrainConfig(epochs=1)), command="x")
    for method, settings in (("rm-slimming", budget), ("rm", replace(budget, rank="importance"))):
        with pytest.raises(ConfigError, match="a budget of memory goes by the peak, which --rank importance does not"):
            run_slim(replace(config, method=(method,), prune=settings, finetune=TrainConfig(epochs=1)), command="x")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(Place, "ratios", by_parameters)
    for settings in (budget, replace(budget, latency_ratio=(0.8,))):
        own = replace(config, prune=settings)
        methods = find_methods(("rm", "mixed", "auto") if settings.latency_ratio else ("rm", "mixed"))
        slim.refuse_early(methods, None, Job(own, slim.open_data(own), torch.device("cpu"), 0))
    run_slim(replace(config, method=("rm",), prune=both), command="x")
    record = records.read_record(tmp_path / "run")
    assert record["pruned"]["macs"] <= 0.5 * record["original"]["macs"]
    assert record["pruned"]["activation_bytes"] <= 0.7 * record["original"]["activation_bytes"]
    assert budget_of(record) == "macs 0.5, memory 0.7" and all(
        e["meets_budget"] for e in ranked(tmp_path / "run", None) if e["candidate"]
    )
