"""Tables: every network and measurement is a row, and means count each once."""

import io
from pathlib import Path

import pytest
from record_examples import example, network
from rich.console import Console

from rmprune.report import frame
from rmprune.report.build import show
from rmprune.report.tables import amount, budget_of, find_setting, method_of, milliseconds, model_of, relative
from rmprune.runs.records import STAGES, find_records, read_record, write_record


def test_a_row_for_each_network_and_measurement(runs: Path) -> None:
    data = frame(sorted(runs.rglob("record.json")))
    assert len(data) == 4 * 4 * 4
    row = data[(data.method == "coupled") & (data.seed == 1) & (data.budget == "macs 0.25")].iloc[0]
    assert (row.model, row.dataset, row.backend, row.threads, row.batch_size) == ("resnet20", "digits", "eager", 2, 1)
    assert row.median_ms == pytest.approx(0.625) and row.ratio == pytest.approx(0.3125)
    assert set(data.method) == {"dense", "plain", "rm", "coupled"}
    assert row.run.endswith("s1-0.25")


def test_means_over_seeds_are_relative_to_dense(runs: Path) -> None:
    summary = relative(frame(sorted(runs.rglob("record.json"))))
    row = summary[(summary.method == "rm") & (summary.budget == "macs 0.5") & (summary.batch_size == 1)].iloc[0]
    assert (
        row.seeds == 2 and row.accuracy == pytest.approx(0.965) and row.accuracy_spread == pytest.approx(0.01 / 2**0.5)
    )
    assert row.accuracy_change == pytest.approx(-0.5)
    assert row.macs_ratio == 0.5 and row.ratio == 0.5
    dense = summary[(summary.method == "dense") & (summary.batch_size == 1) & (summary.backend == "eager")]
    assert len(dense) == 1 and dense.iloc[0].ratio == 1


def test_a_network_that_records_share_counts_once_a_seed(runs: Path) -> None:
    for seed, accuracy in ((0, 0.97), (1, 0.99)):
        for path in runs.rglob(f"s{seed}-*/record.json"):
            record = read_record(path)
            record["original"]["accuracy"] = accuracy
            write_record(path, record)
    summary = relative(frame(find_records([runs, runs / "s0-0.5"])))
    dense = summary[(summary.method == "dense") & (summary.batch_size == 1) & (summary.backend == "eager")].iloc[0]
    assert dense.seeds == 2 and dense.accuracy_spread == pytest.approx(0.02 / 2**0.5)


def test_a_record_named_twice_counts_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    assert len(find_records([runs, Path("runs"), runs / "s0-0.5"])) == 4


def test_records_under_names_of_their_own_keep_their_own_dense_network(tmp_path: Path) -> None:
    """Several may lie in one directory."""
    other = {"original": network(0.9, 10_000_000, 2.0), "pruned": network(0.8, 5_000_000, 1.0)}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    write_record(paths[0], example())
    write_record(paths[1], {key: value for key, value in example(model="other", **other).items() if key != "coupled"})
    summary = relative(frame(paths)).set_index(["model", "method", "backend", "batch_size"])
    own = summary.loc[("other", "rm", "eager", 1)]
    assert own.macs_ratio == 0.5 and own.accuracy_change == pytest.approx(-10)
    assert summary.loc[("other", "dense", "eager", 1)].macs_ratio == 1


def test_the_screen_shows_a_loss_where_there_is_no_accuracy() -> None:
    networks = {
        name: network(0.5, 100, 1.0) | {"accuracy": None, "loss": 0.25 + n} for n, name in enumerate(STAGES[:3])
    }
    stream = io.StringIO()
    show(
        {key: value for key, value in example().items() if key != "coupled"} | networks, Console(file=stream, width=120)
    )
    for words in ("Loss and cost", " 0.25 ", " 2.25 ", "+2.00"):
        assert words in stream.getvalue()


def test_the_screen_shows_everything_relative_to_the_original() -> None:
    stream = io.StringIO()
    show(example(), Console(file=stream, width=120))
    text = stream.getvalue()
    for words in (
        "original",
        "plain",
        "pruned",
        "coupled",
        "96.80%",
        "-0.20",
        "0.50x",
        "500 k",
        "onnxruntime, batch 32",
        "2 threads",
    ):
        assert words in text


def test_names_and_numbers() -> None:
    assert find_setting({"a": {"b": {"model": "x"}}}, "model") == "x"
    assert find_setting({"a": {}}, "model") is None
    assert budget_of(example(config={"ratio": 0.7})) == "channels 0.7"
    assert budget_of(example(config={"budget": {"latency_ratio": 0.5}, "ratio": None})) == "latency 0.5"
    assert budget_of(example(budget={"macs_ratio": 0.1})) == "macs 0.1"
    assert budget_of(example(budget={"params_ratio": 0.3})) == "params 0.3"
    wide = {"model": "mobilenet_v2_small", "free": 4}
    assert model_of(example(model="mobilenet_v2_small", config=wide)) == "mobilenet_v2_small (free 4)"
    assert model_of(example(model="mobilenet_v2_small", config=wide | {"free": 1})) == "mobilenet_v2_small"
    assert model_of(example(width=32, config={"model": "resnet20", "width": 32})) == "resnet20 (width 32)"
    asked = {"model": "repvgg", "depth": 13, "reserve_ratio": 0.5, "width": 8}
    assert model_of(example(model="repvgg", config=asked)) == "repvgg (depth 13, reserve ratio 0.5, width 8)"
    assert method_of(example(method="inner,coupled,rm", inner=network(0.9, 10, 1.0)), "pruned") == "rm"
    assert method_of(example(method="mixed-auto,mixed", mixed=network(0.9, 10, 1.0)), "mixed") == "mixed"
    record = example(method="rm-gradual,coupled-taylor", inner=network(0.9, 10, 1.0) | {"method": "inner"})
    assert [method_of(record, n) for n in ("original", "plain", "pruned", "coupled", "inner")] == [
        "dense",
        "plain",
        "rm-gradual",
        "coupled-taylor",
        "inner",
    ]
    assert [amount(v) for v in (1.814e9, 300_774_272, 12_345, 7)] == ["1.81 G", "301 M", "12.3 k", "7"]
    assert [milliseconds(v) for v in (0.4171, 1.829, 73.66, 1240.4)] == ["0.417", "1.83", "73.7", "1240"]
