"""The whole job on the digits, in miniature: every method in one record, within its budget; what is done is not done again."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from pruning_nets import Tokens
from slim_runs import short_mobilenet
from torch import nn

from rmprune.amc.choose import Goal
from rmprune.amc.table import AMC_METHODS
from rmprune.artifact import files as artifact
from rmprune.config import AmcConfig, DataConfig, MeasureConfig, RemovalConfig, SearchConfig, TrainConfig
from rmprune.data.load import load_dataset
from rmprune.errors import ConfigError, InfeasibleBudget, UnsupportedModel
from rmprune.measure import count_macs
from rmprune.measure.place import Place
from rmprune.methods import slim as methods
from rmprune.pipelines import amc as pipeline
from rmprune.pipelines.amc import run_amc
from rmprune.pruning.carry_out import carry_out
from rmprune.pruning.plan import Choice, SlimPlan
from rmprune.removal import Removal
from rmprune.report.build import build_report
from rmprune.runs import records
from rmprune.runs.directory import claim
from rmprune.training.job import Job

QUICK = AmcConfig(
    model="short_mobilenet",
    width=0.5,
    method=("rm-amc", "rm-random", "residual-amc", "uniform"),
    data=DataConfig(train_images=256, batch_size=64),
    train=TrainConfig(epochs=1),
    finetune=TrainConfig(epochs=1, learning_rate=0.02, distillation=0.5),
    search=SearchConfig(episodes=5, warm_up=3, images=64, calibration=64, importance="magnitude", multiple=4),
    measure=MeasureConfig(backends=("eager",), threads=(1,), batch_sizes=(1,), seconds=0.02, min_rounds=3),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "amc"
    assert run_amc(dataclasses.replace(QUICK, out=out), command="python -m rmprune amc") == [out / "record.json"]
    return out


def test_every_method_is_within_the_budget_of_the_original(run: Path) -> None:
    record = records.read_record(run)
    limit = 0.5 * record["original"]["macs"]
    assert record["plain"]["macs"] > record["original"]["macs"]
    assert record["budget"] == {"macs_ratio": 0.5}
    assert record["removal"]["removed"] == ["features.3", "features.4"]
    for name in QUICK.method:
        assert record[name]["macs"] <= limit
        assert record[name]["method"] == name
        assert count_macs(artifact.load(run / name), torch.zeros(1, 1, 8, 8)) == record[name]["macs"]
        assert (run / name / "model.onnx").is_file()
    kinds = {type(module).__name__ for module in artifact.load(run / "rm-amc").modules()}
    assert kinds <= {
        "Sequential",
        "Conv2d",
        "BatchNorm2d",
        "ReLU6",
        "AdaptiveAvgPool2d",
        "Flatten",
        "Linear",
        "Dropout",
    }


def test_the_searches_are_in_the_record_and_logged(run: Path) -> None:
    record = records.read_record(run)
    for name in ("rm-amc", "rm-random", "residual-amc"):
        lines = (run / "search" / name / "episodes.jsonl").read_text().splitlines()
        assert [json.loads(line)["reward"] for line in lines] == [
            e["reward"] for e in record[name]["search"]["episodes"]
        ]
        assert len(lines) == 5
    assert record["uniform"]["search"]["width"] < 0.5


@pytest.mark.long
def test_the_report_has_the_figure_of_the_search(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", Figure.savefig.__wrapped__)  # type: ignore[attr-defined]  # not roughly
    written = build_report(run, tmp_path, "x")
    assert tmp_path / "search.png" in written
    assert (tmp_path / "search.svg").stat().st_size > 5000
    rows = (tmp_path / "results.csv").read_text()
    assert all(f",{name}," in rows for name in QUICK.method)


@pytest.mark.long
def test_an_interrupted_run_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its record and one network: that network alone is made again, from its saved search, and is the same."""
    before = artifact.load(run / "rm-random").state_dict()
    (run / "record.json").unlink()
    (run / "rm-random").rename(run / "elsewhere")
    monkeypatch.setattr("rmprune.pipelines.stages.tune", None)
    monkeypatch.setattr("rmprune.pipelines.stages.start", lambda *_: pytest.fail("removed again"))
    run_amc(dataclasses.replace(QUICK, out=run), command="again")
    after = artifact.load(run / "rm-random").state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.long
def test_gradual_cuts_end_at_the_policy(run: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        QUICK, method=("rm-uniform",), apply="gradual", prune_epochs=0.5, checkpoint=run / "dense", out=tmp_path / "run"
    )
    (record,) = run_amc(config, command="x")
    found = records.read_record(record)
    widths = {entry["group"]: entry["kept"] for entry in found["rm-uniform"]["search"]["widths"]}
    model = artifact.load(tmp_path / "run" / "rm-uniform")
    assert {name: model.get_submodule(name).out_channels for name in widths} == widths
    assert found["rm-uniform"]["macs"] <= 0.5 * found["original"]["macs"]


@pytest.mark.long
def test_a_policy_is_applied_although_nothing_is_fine_tuned(run: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        QUICK,
        method=("rm-uniform",),
        apply="gradual",
        finetune=TrainConfig(epochs=0),
        checkpoint=run / "dense",
        out=tmp_path / "run",
    )
    found = records.read_record(run_amc(config, command="x")[0])
    assert found["rm-uniform"]["macs"] <= 0.5 * found["original"]["macs"]


def test_overwriting_with_an_impossible_budget_keeps_the_finished_run(run: Path) -> None:
    impossible = dataclasses.replace(QUICK.search, lowest=0.9, budget=(0.2,))
    with pytest.raises(InfeasibleBudget):
        run_amc(dataclasses.replace(QUICK, search=impossible, out=run, overwrite=True), command="x")
    assert (run / "record.json").is_file() and (run / "dense").is_dir()


@pytest.mark.long
def test_mixed_removes_what_is_faster_and_affordable_without_changing_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removal_is_faster(place: Place, networks: dict[str, nn.Module]) -> dict[str, float]:
        return {name: 0.5 if name == "removed" else 1.0 for name in networks}

    monkeypatch.setattr(Place, "ratios", removal_is_faster)
    short = dataclasses.replace(QUICK.search, episodes=2, warm_up=1)
    narrow = dataclasses.replace(short, budget=(0.9,), highest=0.5)  # leaves MACs for the copies
    small = dataclasses.replace(QUICK, model="short_resnet", width=8, train=TrainConfig(epochs=0))
    for search, count in ((short, 0), (narrow, 2)):
        out = tmp_path / str(count)
        config = dataclasses.replace(small, method=("residual-amc", "mixed-amc"), search=search, out=out)
        record = records.read_record(run_amc(config, command="x")[0])
        assert len(record["mixed-amc"]["removal"]["removed"]) == count and "removal" not in record["residual-amc"]
        assert record["mixed-amc"]["macs"] <= search.budget[0] * record["original"]["macs"]
        kept, removed = (artifact.load(out / name).double() for name in config.method)
        x = 3 * torch.randn(16, 1, 8, 8, dtype=torch.float64)
        assert (record["mixed-amc"]["macs"] > record["residual-amc"]["macs"]) == (count > 0)
        torch.testing.assert_close(removed(x), kept(x), rtol=1e-4, atol=1e-4)  # both were saved in float32


def test_what_mixed_amc_removes_is_exact_for_every_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained after it: bounds of a few images will not do."""
    asked: dict[str, object] = {}

    def left(network: nn.Module, *_: object, **settings: object) -> Removal:
        asked.update(settings)
        return Removal(network, [], {}, 0.0, [])

    monkeypatch.setattr(methods, "remove_where_faster", left)
    model = short_mobilenet("", num_classes=10, in_channels=1, width=0.5).eval()
    job = Job(QUICK, load_dataset(QUICK.data), torch.device("cpu"), 0, teacher=model)
    pipeline._remove_faster(model, "mixed-amc", Goal(0.5), job)
    assert (asked["ranges"], asked["fuse"]) == ("provable", "cheaper")


def test_a_budget_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="every value once"):
        dataclasses.replace(QUICK.search, budget=(0.5, 0.6, 0.50))


def test_refusals_come_before_training(tmp_path: Path) -> None:
    impossible = dataclasses.replace(QUICK.search, lowest=0.9, budget=(0.2,))
    measured = dataclasses.replace(QUICK.search, constraint="latency")
    for change, error in (
        ({"method": ("evolution",)}, ConfigError),
        ({"search": impossible, "method": ("residual-amc",)}, InfeasibleBudget),
        ({"search": dataclasses.replace(QUICK.search, budget=(0.1,)), "method": ("uniform",)}, InfeasibleBudget),
        ({"model": "resnet20", "width": None, "free": 2}, ConfigError),
        ({"search": dataclasses.replace(QUICK.search, warm_up=5)}, ConfigError),
        ({"search": measured, "removal": RemovalConfig(keep=("nowhere",))}, ConfigError),
        ({"search": measured, "model": "resnet20", "width": None, "method": ("uniform",)}, ConfigError),
        ({"search": measured, "measure": dataclasses.replace(QUICK.measure, device="cuda")}, ConfigError),
    ):
        with pytest.raises(error):
            run_amc(dataclasses.replace(QUICK, out=tmp_path / "run", **change), command="x")
        assert not (tmp_path / "run").exists()
    assert all(method.about for method in AMC_METHODS.values())


def test_a_run_that_goes_on_is_refused_as_early_as_a_new_one(tmp_path: Path) -> None:
    cut_short = dataclasses.replace(QUICK, method=("uniform",), out=tmp_path / "run")
    impossible = dataclasses.replace(cut_short, search=dataclasses.replace(QUICK.search, budget=(0.1,)))
    job = Job(impossible, load_dataset(QUICK.data), torch.device("cpu"), 0)
    with claim(impossible.directory, impossible, records=[], networks=(), overwrite=False):
        (impossible.directory / "plain").mkdir()
    with pytest.raises(InfeasibleBudget):
        run_amc(impossible, command="x", load=lambda *_: job.data)
    assert not (impossible.directory / "dense").exists()


@pytest.mark.long
def test_the_agent_searches_the_widths_of_a_plan(run: Path, tmp_path: Path) -> None:
    """Its blocks are the plan's, whatever that says of widths, and what comes is a plan that `slim` carries out."""
    blocks: dict[str, Choice] = {"features.3": "merge", "features.4": "drop"}
    (tmp_path / "plan.json").write_text(json.dumps(SlimPlan(blocks, {"features_0_0": 4}).to_dict()))
    config = dataclasses.replace(
        QUICK, method=(), plan=tmp_path / "plan.json", checkpoint=run / "dense", out=tmp_path / "run"
    )
    config = dataclasses.replace(config, search=dataclasses.replace(QUICK.search, episodes=2, warm_up=1))
    assert config.method == ("plan-amc",)
    (path,) = run_amc(config, command="x")
    found = records.read_record(path)
    entry = found["plan-amc"]
    assert entry["macs"] <= 0.5 * found["original"]["macs"] and len(entry["search"]["episodes"]) == 2
    plan = SlimPlan.from_dict(entry["plan"])
    assert {block: choice for block, choice in plan.blocks.items() if choice != "keep"} == blocks
    dense = short_mobilenet("", num_classes=10, in_channels=1, width=0.5).eval()
    images = torch.randn(32, 1, 8, 8)
    again, _ = carry_out(dense, plan, [(images, torch.arange(32) % 10)], importance="magnitude")
    assert count_macs(again, images[:1]) == entry["macs"]


def test_a_plan_that_no_method_reads_and_a_wrong_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"schema": 1, "blocks": {"nowhere": "drop"}}')
    for change, said in (
        ({"plan": tmp_path / "plan.json"}, "no method looks at the plan"),
        ({"method": ("plan-amc", "rm-amc")}, "method plan-amc is about a plan's blocks; give --plan"),
        ({"method": (), "plan": tmp_path / "plan.json"}, "there is no block nowhere"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_amc(dataclasses.replace(QUICK, out=tmp_path / "no", **change), command="x")
    assert not (tmp_path / "no").exists()


def test_attention_is_refused_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "make_dense", lambda *_: Tokens().eval())
    with pytest.raises(UnsupportedModel, match=r"^norm: fitting layers cannot .*; amc scores widths by fits: slim"):
        run_amc(dataclasses.replace(QUICK, method=("residual-amc",), out=tmp_path / "no"), command="x")
    assert not (tmp_path / "no").exists()
