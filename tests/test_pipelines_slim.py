import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rmprune
from rmprune.config import MeasureConfig, NetworkConfig, PruneConfig, RemeasureConfig, SlimConfig, TrainConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.data.sources import Images
from rmprune.data.splits import TensorSplit
from rmprune.errors import ArtifactError, ConfigError, InfeasibleBudget, UnsupportedModel
from rmprune.measure.latency_model import LatencyModel
from rmprune.measure.place import Place, find_ratio
from rmprune.methods.choose import Verdicts, best, judge
from rmprune.methods.cutter import make_cutter
from rmprune.methods.slim import scaled
from rmprune.methods.start import STARTING
from rmprune.methods.table import METHODS
from rmprune.pipelines import slim
from rmprune.pipelines.convert import open_network
from rmprune.pipelines.measure import run_measure
from rmprune.pipelines.slim import run_slim
from rmprune.pruning import Budget
from rmprune.report.build import build_report
from rmprune.runs import records
from rmprune.runs.cells import plan_cells
from rmprune.training import evaluate

QUICK = SlimConfig(
    model="resnet8",
    width=4,
    method=("rm", "coupled"),
    train=TrainConfig(epochs=2),
    finetune=TrainConfig(epochs=2, learning_rate=0.02),
    prune=PruneConfig(macs_ratio=(0.5,), cuts=4, round_to=1),
    measure=MeasureConfig(threads=(1,), batch_sizes=(1,), seconds=0.02, min_rounds=3),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run_slim(replace(QUICK, out=out), command="python -m rmprune slim")
    return out


def test_the_record_says_what_was_promised(finished: Path) -> None:
    record = records.read_record(finished)
    assert record["removal"]["removed"] == ["layer1.0", "layer2.0", "layer3.0"] and record["removal"]["kept"] == {}
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


def test_an_interrupted_run_goes_on_to_the_same_result(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = slim.fit, tmp_path / "run"

    def interrupted(*args: object, **kwargs: object) -> torch.nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setattr("rmprune.methods.slim.fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_slim(replace(QUICK, out=out), command="x")
    assert (out / "dense").is_dir() and not (out / "record.json").exists()
    monkeypatch.setattr("rmprune.methods.slim.fit", real)
    run_slim(replace(QUICK, out=out), command="x")
    first, second = (json.loads((run / "record.json").read_text()) for run in (finished, out))
    for name in ("original", "plain", "pruned", "coupled"):
        assert first[name]["accuracy"] == second[name]["accuracy"] and first[name]["macs"] == second[name]["macs"]


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


def test_cells_of_a_sweep_share_their_training() -> None:
    cells = plan_cells(Path("r"), 0, 2, [("macs_ratio", 0.5), ("macs_ratio", 0.25)])
    assert [str(cell.directory) for cell in cells] == [
        "r/seed0/macs_ratio-0.5", "r/seed0/macs_ratio-0.25", "r/seed1/macs_ratio-0.5", "r/seed1/macs_ratio-0.25",
    ]  # fmt: skip
    assert {str(cell.shared) for cell in cells} == {"r/seed0", "r/seed1"}


def by_parameters(place: Place, networks: dict[str, torch.nn.Module]) -> dict[str, float]:
    whole = rmprune.measure.count_params(place.original)
    return {name: rmprune.measure.count_params(network) / whole for name, network in networks.items()}


@pytest.mark.parametrize("method", ["rm", "mixed", "coupled", "uniform", "inner"])
def test_a_budget_in_measured_time_is_met(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is made up (parameters of the network), so that the test does not depend on the machine."""
    monkeypatch.setattr(Place, "ratios", by_parameters)
    config = replace(
        QUICK, method=(method,), prune=PruneConfig(latency_ratio=(0.6,), cuts=4, round_to=1), out=tmp_path / "run"
    )
    run_slim(config, command="x")
    record = records.read_record(tmp_path / "run")
    found = record["pruned" if method == "rm" else method]
    assert 0.3 < found["params"] / record["original"]["params"] <= 0.6
    logs = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert not any("again" in str(line) for line in logs)  # met without an epoch that others do not get


def test_cuts_by_measured_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up: a layer takes as long as it has weights, a network as long as it has parameters."""
    monkeypatch.setattr(Place, "ratios", by_parameters)
    monkeypatch.setattr(
        LatencyModel, "_measure", lambda self, layers: [layer.cin * layer.cout * 1e-3 for layer in layers]
    )
    prune = PruneConfig(latency_ratio=(0.6,), cost="time", cuts=4, round_to=1)
    run_slim(replace(QUICK, method=("residual",), prune=prune, out=tmp_path / "run"), command="x")
    table = json.loads((tmp_path / "run" / "layer-times-onnxruntime-1-1.json").read_text())
    assert table["threads"] == 1 and len(table["layers"]) > 10


@pytest.mark.parametrize("gradual", [True, False])
def test_a_wrong_measurement_of_the_narrowest_network_costs_no_run(
    gradual: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to cut when one measurement says 'too slow': training goes on, and the same command measures again."""
    wrong = [1.2]

    def once_wrong(place: Place, networks: dict[str, torch.nn.Module]) -> dict[str, float]:
        by_size = by_parameters(place, networks)
        rounds.append(len(by_size))
        return {name: ratio * (wrong[0] if rounds.count(1) > 1 else 1.0) for name, ratio in by_size.items()}

    rounds: list[int] = []  # the first single network measured is the narrowest one, before training
    monkeypatch.setattr(Place, "ratios", once_wrong)
    prune = PruneConfig(latency_ratio=(0.55,), min_fraction=0.69, cuts=4, round_to=1, gradual=gradual)
    config = replace(
        QUICK, width=16, method=("residual",), skip_infeasible=True, prune=prune, out=tmp_path / "run"
    )  # what is trained is not skipped for one measurement either
    with pytest.raises(InfeasibleBudget, match=r"^latency_ratio=0.55 cannot be met on .* takes 0\.[56]"):
        run_slim(config, command="x")
    wrong[0] = 1.0
    run_slim(config, command="x")
    record = records.read_record(tmp_path / "run")
    assert record["residual"]["params"] <= 0.55 * record["original"]["params"]


def test_residuals_are_removed_only_within_a_budget_of_macs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "ratios", lambda place, networks: {n: 0.5 if n == "removed" else 1.0 for n in networks})
    config = replace(QUICK, method=("mixed",), finetune=TrainConfig(epochs=0))
    run_slim(replace(config, out=tmp_path / "macs"), command="x")
    record = records.read_record(tmp_path / "macs")
    assert record["mixed"]["macs"] <= 0.5 * record["original"]["macs"] and record["mixed"]["removal"]["removed"] == []
    run_slim(replace(config, prune=PruneConfig(ratio=(0.3,), round_to=1), out=tmp_path / "ratio"), command="x")
    assert records.read_record(tmp_path / "ratio")["mixed"]["removal"]["removed"] == [
        "layer1.0",
        "layer2.0",
        "layer3.0",
    ]


def test_the_default_floor_forbids_no_budget(tmp_path: Path) -> None:
    prune = PruneConfig(macs_ratio=(0.35,), round_to=1)
    run_slim(
        replace(QUICK, method=("inner",), finetune=TrainConfig(epochs=0), prune=prune, out=tmp_path / "r"), command="x"
    )
    record = records.read_record(tmp_path / "r")
    assert 0.3 < record["inner"]["macs"] / record["original"]["macs"] <= 0.35


def test_a_table_of_the_processor_is_no_cost_of_a_gpu() -> None:
    with pytest.raises(ConfigError, match="measured on the CPU"):
        replace(QUICK, prune=PruneConfig(latency_ratio=(0.5,), cost="time"), measure=MeasureConfig(device="cuda"))


def test_further_cuts_do_not_apply_the_upper_limit_again() -> None:
    assert scaled(Budget(macs_ratio=0.5, max_fraction=0.8), 0.9) == Budget(macs_ratio=0.45)


def test_a_budget_that_no_width_meets_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Place, "ratios", by_parameters)
    prune = PruneConfig(latency_ratio=(0.3,), min_fraction=0.7, round_to=1)
    with pytest.raises(InfeasibleBudget, match=r"the narrowest network .* takes 0\.[3-9]"):
        run_slim(replace(QUICK, method=("residual",), prune=prune, out=tmp_path / "run"), command="x")
    assert not (tmp_path / "run").exists()


def test_a_comparison_goes_on_without_the_methods_that_cannot_meet_a_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prune = PruneConfig(macs_ratio=(0.35, 0.15), round_to=1)
    short = replace(QUICK, train=TrainConfig(epochs=0), finetune=TrainConfig(epochs=0), prune=prune)
    config = replace(short, method=("inner", "residual"), out=tmp_path / "run")
    with pytest.raises(InfeasibleBudget, match=r"^inner: macs_ratio 0\.15 .*--skip-infeasible$"):
        run_slim(config, command="x")
    assert not (tmp_path / "run").exists()
    wide, narrow = run_slim(replace(config, skip_infeasible=True), command="x")
    assert {"inner", "residual"} < set(records.read_record(wide)) and "refused" not in records.read_record(wide)
    record = records.read_record(narrow)
    assert set(records.networks(record)) == {"original", "residual"} and record["method"] == "residual"
    assert list(record["refused"]) == ["inner"] and "macs_ratio 0.15" in record["refused"]["inner"]
    assert "inner is left out: macs_ratio 0.15" in caplog.text
    build_report(tmp_path / "run", tmp_path / "report", "x")
    assert (
        "resnet8 (width 4), seed 0, macs 0.15: without inner, as macs_ratio 0.15"
        in (tmp_path / "report" / "index.html").read_text()
    )
    with pytest.raises(InfeasibleBudget, match=r"no method can be had: inner: macs_ratio 0\.15"):
        run_slim(replace(config, method=("inner",), skip_infeasible=True, out=tmp_path / "no"), command="x")
    assert not (tmp_path / "no").exists()


def test_one_disturbed_measurement_refuses_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.4, 0.3])
    monkeypatch.setattr(Place, "ratios", lambda place, networks: {name: next(times) for name in networks})
    network = torch.nn.Linear(1, 1)
    place = Place.first(QUICK.measure, network, torch.zeros(1, 1))
    assert place.least_ratio(network, 0.5) == 0.3

    times = iter([1.4, 1.2, 1.3, 0.3])
    assert place.least_ratio(network, 0.5) == 1.2  # three, then it is believed


def test_the_narrowest_network_needs_nothing_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts aim a little below the budget; where the narrowest one is just within it, that is enough."""
    monkeypatch.setattr(Place, "ratios", lambda place, networks: dict.fromkeys(networks, 0.495))
    place = Place.first(QUICK.measure, torch.nn.Linear(1, 1), torch.zeros(1, 1))
    assert find_ratio(lambda ratio: torch.nn.Linear(1, 1), 0.1, 0.999, 0.5, place) == pytest.approx(0.1)
    with pytest.raises(InfeasibleBudget, match=r"takes 0\.49"):
        find_ratio(lambda ratio: torch.nn.Linear(1, 1), 0.1, 0.999, 0.49, place)


def noise() -> Dataset:
    split = TensorSplit(
        Images(torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40) % 10),
        torch.full((3,), 128.0),
        torch.full((3,), 64.0),
        may_flip=False,
    )
    return Dataset("noise", 10, (3, 32, 32), split, split, split, QUICK.data)


@pytest.mark.parametrize(
    ("model", "method", "reason"),
    [
        ("squeezenet1_1", "coupled", "no batch norm"),
        ("shufflenet_v2_x0_5", "residual", "Torch-Pruning cannot follow this network"),
        ("convnext_tiny", "residual", "--no-reconstruct"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_training(
    model: str, method: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise()
    monkeypatch.setattr(slim, "load_dataset", lambda config: data)
    monkeypatch.setattr(slim, "fit", lambda *_, **__: pytest.fail("trained for nothing"))
    config = replace(QUICK, model=model, width=None, method=(method,), prune=PruneConfig(macs_ratio=(0.5,)))
    with pytest.raises(UnsupportedModel, match=reason):
        run_slim(replace(config, out=tmp_path / "run"), command="x")
    assert not (tmp_path / "run").exists()


class Small(torch.nn.Module):
    """A hidden linear layer without a batch norm; `branching` on data, which torch.fx cannot trace."""

    def __init__(self, branching: bool) -> None:
        super().__init__()
        self.branching = branching
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        )  # fmt: skip
        self.hidden, self.head = torch.nn.Linear(16, 24), torch.nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.branching and x.sum() > 1e9:
            return torch.zeros(len(x), 10)
        return self.head(torch.relu(self.hidden(self.features(x))))


def test_coupled_meets_a_time_where_some_layers_have_no_batch_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Place, "ratios", by_parameters)
    monkeypatch.setattr(slim, "create_network", lambda *_, **__: Small(branching=False))
    config = replace(QUICK, method=("coupled",), prune=PruneConfig(latency_ratio=(0.7,), round_to=1))
    (path,) = run_slim(replace(config, train=TrainConfig(epochs=1), out=tmp_path / "run"), command="x")
    record = records.read_record(path)
    assert record["coupled"]["params"] <= 0.7 * record["original"]["params"]


def test_a_network_that_no_file_can_hold_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slim, "create_network", lambda *_, **__: Small(branching=True))
    monkeypatch.setattr(slim, "fit", lambda *_, **__: pytest.fail("trained for nothing"))
    with pytest.raises(UnsupportedModel, match="trace"):
        run_slim(replace(QUICK, method=("uniform",), out=tmp_path / "run"), command="x")
    assert not (tmp_path / "run").exists()


def test_cut_while_training_layers_must_be_fittable_only_where_a_cut_at_once_may_follow() -> None:
    network = rmprune.models.create("convnext_tiny", num_classes=10).eval()
    data = noise()
    config = replace(QUICK, prune=replace(QUICK.prune, gradual=True))
    cutter = make_cutter(network, METHODS["residual"], config, data)
    cutter.check(once=False)
    with pytest.raises(UnsupportedModel, match="--no-reconstruct"):
        cutter.check(once=True)


def test_collapsed_blocks_are_pruned_and_the_record_says_which(tmp_path: Path) -> None:
    methods = ("rm-collapse", "mixed-collapse", "coupled-collapse", "coupled-half-collapse")
    (path,) = run_slim(replace(QUICK, method=methods, out=tmp_path / "run"), command="x")
    record = records.read_record(path)
    assert set(records.networks(record)) == {"original", *methods} and record["removal"] is None
    blocks = {"layer1.0", "layer2.0", "layer3.0"}
    for name in ("coupled-collapse", "coupled-half-collapse"):
        assert record[name].get("removal") is None
    for name in ("rm-collapse", "mixed-collapse"):
        assert record[name]["removal"]["removed"] and record[name]["removal"]["max_error"] < 1e-10
    assert set(record["rm-collapse"]["collapsed"]) == set(record["coupled-collapse"]["collapsed"]) == blocks
    kept = blocks - set(record["mixed-collapse"]["collapsed"])
    assert record["coupled-half-collapse"]["collapsed"] == record["mixed-collapse"]["collapsed"]
    explained = record["rm-collapse"]["collapsed"]
    assert kept == {min(explained, key=lambda name: explained[name])}
    sizes = {name: convolutions(rmprune.load(tmp_path / "run" / name)) for name in methods}
    assert sizes["rm-collapse"] == 4 and sizes["coupled-collapse"] == 6  # two shortcuts are convolutions
    assert sizes["mixed-collapse"] == 4 + 1 + (kept != {"layer1.0"}) and sizes["coupled-half-collapse"] == 4 + 1 + 2
    for name in methods:
        assert record[name]["macs"] <= 0.5 * record["original"]["macs"]
    with pytest.raises(UnsupportedModel, match="no block to collapse"):
        run_slim(replace(QUICK, model="preact_resnet20", method=("rm-collapse",), out=tmp_path / "no"), command="x")
    assert not (tmp_path / "no").exists()


def convolutions(model: torch.nn.Module) -> int:
    return sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())


def test_a_candidate_that_goes_on_is_what_its_method_alone_would_be(tmp_path: Path) -> None:
    (path,) = run_slim(replace(QUICK, method=("mixed-auto",), out=tmp_path / "run"), command="x")
    record = records.read_record(path)
    assert set(records.networks(record)) == {"original", "mixed-auto"} and record["removal"] is None
    found = record["mixed-auto"]
    assert set(found["candidates"]) == {"residual", "mixed-collapse", "rm-collapse", "rm"}
    (path,) = run_slim(replace(QUICK, method=(found["chosen"],), out=tmp_path / "alone"), command="x")
    alone = records.read_record(path)["pruned" if found["chosen"] == "rm" else found["chosen"]]
    assert (found["accuracy"], found["macs"]) == (alone["accuracy"], alone["macs"])  # the same cut, the same epochs


def test_the_candidate_of_the_least_loss_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for least in ("rm", "rm-collapse"):
        losses = {"residual": 0.5, "mixed-collapse": 0.4, "rm-collapse": 0.3, "rm": 0.2} | {least: 0.1}
        verdicts = {name: {"loss": loss} for name, loss in losses.items()}
        monkeypatch.setattr(slim, "judge", lambda *args, verdicts=verdicts, **kwargs: verdicts)
        config = replace(QUICK, method=("mixed-auto",), finetune=TrainConfig(epochs=0), out=tmp_path / least)
        run_slim(config, command="x")
        found = records.read_record(tmp_path / least)["mixed-auto"]
        assert found["chosen"] == least and found["removal"]["max_error"] < 1e-10
        assert convolutions(rmprune.load(tmp_path / least / "mixed-auto")) == (7 if least == "rm" else 4)


def test_candidates_are_judged_once_and_on_validation_images_alone(tmp_path: Path) -> None:
    config = replace(QUICK, method=("mixed-auto",), out=tmp_path)
    data = load_dataset(config.data)
    dense = slim.make_dense(config, data, 0)
    blind = replace(data, test=None)  # type: ignore[arg-type]
    budget = Budget(macs_ratio=0.5, reference_macs=rmprune.count_macs(dense, data.train.example(1)))

    def start(name: str) -> torch.nn.Module:
        if name == "plain":
            raise UnsupportedModel("not this one")
        return STARTING[name](dense, data.train.example)[0]

    def verdicts(start: Callable[[str], torch.nn.Module]) -> Verdicts:
        place = {"checkpoint": tmp_path / "c" / "x.pt", "device": torch.device("cpu")}
        return judge("mixed-auto", METHODS["mixed-auto"], start, budget, config, blind, dense, **place)  # type: ignore[arg-type]

    found = verdicts(start)
    assert found["rm"] == {"refused": "not this one"} and best(found) != "rm"
    cutter = make_cutter(dense, METHODS["residual"], config, data)
    residual = cutter.once(dense, cutter.floored(budget))
    assert found["residual"]["loss"] == pytest.approx(evaluate(residual, data.validation).loss)
    assert verdicts(lambda name: pytest.fail("judged again")) == found
    with pytest.raises(UnsupportedModel, match="no candidate of none can be had: residual: never;"):

        def never(name: str) -> torch.nn.Module:
            raise UnsupportedModel("never")

        place = {"checkpoint": tmp_path / "c" / "x.pt", "device": torch.device("cpu")}
        judge("none", METHODS["mixed-auto"], never, budget, config, blind, dense, **place)  # type: ignore[arg-type]
    assert not (tmp_path / "c" / "none-candidates.json").exists()
    (tmp_path / "c" / "mixed-auto-candidates.json").write_text('{"rm": ')
    with pytest.raises(ArtifactError, match=r"mixed-auto-candidates\.json: damaged"):
        verdicts(start)


def test_candidates_that_the_network_has_no_place_for_are_left_out(tmp_path: Path) -> None:
    config = replace(QUICK, model="preact_resnet20", train=TrainConfig(epochs=0), finetune=TrainConfig(epochs=0))
    run_slim(replace(config, method=("mixed-auto",), out=tmp_path / "run"), command="x")
    candidates = records.read_record(tmp_path / "run")["mixed-auto"]["candidates"]
    assert [name for name, verdict in candidates.items() if "loss" in verdict] == ["residual", "rm"]
    assert "no block to collapse" in candidates["rm-collapse"]["refused"]


def test_one_candidate_that_meets_the_budget_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "ratios", by_parameters)
    prune = PruneConfig(latency_ratio=(0.6,), min_fraction=0.9, round_to=1)
    config = replace(QUICK, width=16, method=("mixed-auto",), prune=prune, out=tmp_path / "run")
    run_slim(config, command="x")
    record = records.read_record(tmp_path / "run")
    assert "cannot be met" in record["mixed-auto"]["candidates"]["residual"]["refused"]
    assert record["mixed-auto"]["params"] <= 0.6 * record["original"]["params"]
    prune = replace(prune, latency_ratio=(0.2,))
    with pytest.raises(InfeasibleBudget, match=r"no candidate of mixed-auto can be had: residual: .*; rm: "):
        run_slim(replace(config, prune=prune, out=tmp_path / "no"), command="x")
    assert not (tmp_path / "no").exists()


def test_a_share_of_each_network_s_own_channels_is_no_equal_cost(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use --macs-ratio or --latency-ratio"):
        run_slim(
            replace(QUICK, method=("mixed-auto",), prune=PruneConfig(ratio=(0.5,)), out=tmp_path / "run"), command="x"
        )
