"""One method: budgets in measured time and MACs are met, each way of cutting."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from marks import few
from slim_runs import ON_BOTH_BACKENDS, QUICK, Small, by_parameters, noise, short_mobilenet, short_resnet

from rmprune import artifact
from rmprune.config import PruneConfig, TrainConfig
from rmprune.errors import ConfigError, DataError, InfeasibleBudget
from rmprune.measure import count_macs
from rmprune.measure.latency_model import LatencyModel
from rmprune.measure.place import Place
from rmprune.methods import slim as methods
from rmprune.methods.cutter import make_cutter
from rmprune.methods.slim import scaled, slim_network
from rmprune.methods.table import METHODS, network_name
from rmprune.pipelines import slim, stages
from rmprune.pipelines.slim import run_slim
from rmprune.pruning import Budget
from rmprune.pruning.carry_out import carry_out
from rmprune.pruning.plan import SlimPlan
from rmprune.runs import records
from rmprune.training import TrainState
from rmprune.training.job import Files, Job

IN_TIME = ("rm", "mixed", "coupled", "uniform", "inner")


@pytest.fixture(scope="module")
def in_time(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Time is made up (parameters of the network), so that the tests do not depend on the machine."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "ratios", by_parameters)
        patch.setattr(slim, "check_budgets", lambda *_: None)
        prune = PruneConfig(latency_ratio=(0.6,), cuts=4, round_to=1)
        run_slim(replace(QUICK, method=IN_TIME, prune=prune, out=out), command="x")
    return out


@pytest.mark.long
@pytest.mark.parametrize("method", IN_TIME)
def test_a_budget_in_measured_time_is_met(method: str, in_time: Path) -> None:
    record = records.read_record(in_time)
    found = record["pruned" if method == "rm" else method]
    assert 0.2 < found["params"] / record["original"]["params"] <= 0.6


@pytest.mark.long
def test_budgets_in_time_are_met_without_an_epoch_that_other_methods_do_not_get(in_time: Path) -> None:
    logs = [json.loads(line) for line in (in_time / "log.jsonl").read_text().splitlines()]
    assert {line["label"] for line in logs if "label" in line} >= set(IN_TIME)
    assert not any("again" in str(line) for line in logs)


@pytest.mark.long
def test_cuts_by_measured_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up: a layer takes as long as it has weights, a network as long as it has parameters."""
    monkeypatch.setattr(Place, "ratios", by_parameters)
    monkeypatch.setattr(
        LatencyModel, "_measure", lambda self, layers: [layer.cin * layer.cout * 1e-3 for layer in layers]
    )
    prune = PruneConfig(latency_ratio=(0.6,), cost="time", cuts=4, round_to=1)
    config = replace(ON_BOTH_BACKENDS, model="resnet8", method=("residual",), prune=prune, out=tmp_path / "run")
    run_slim(config, command="x")
    table = json.loads((tmp_path / "run" / "layer-times-onnxruntime-1-1.json").read_text())
    assert table["threads"] == 1 and len(table["layers"]) > 10


@pytest.mark.long
@pytest.mark.parametrize("gradual", [True, False])
def test_a_wrong_measurement_of_the_narrowest_network_costs_no_run(
    gradual: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to cut when one measurement says 'too slow': training goes on, and the same command measures again."""
    wrong = [1.2]

    def once_wrong(place: Place, networks: dict[str, torch.nn.Module]) -> dict[str, float]:
        by_size = by_parameters(place, networks)
        alone.append("network" in by_size)
        return {name: ratio * (wrong[0] if sum(alone) > 1 else 1.0) for name, ratio in by_size.items()}

    alone: list[bool] = []  # the first that no search measures is the narrowest one, before training
    monkeypatch.setattr(Place, "ratios", once_wrong)
    prune = PruneConfig(latency_ratio=(0.55,), min_fraction=0.69, cuts=4, round_to=1, gradual=gradual)
    config = replace(
        QUICK, model="resnet8", width=16, method=("residual",), skip_infeasible=True, prune=prune, out=tmp_path / "run"
    )
    with pytest.raises(InfeasibleBudget, match=r"residual: latency_ratio=0.55 cannot be met on .* takes 0\.[56]"):
        run_slim(config, command="x")
    wrong[0] = 1.0
    run_slim(config, command="x")
    record = records.read_record(tmp_path / "run")
    assert record["residual"]["params"] <= 0.55 * record["original"]["params"]


@pytest.mark.long
def test_a_trained_network_that_misses_its_budget_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --skip-infeasible: what comes after it is done. Without its record the same command tries it once more, and nothing else."""
    slow = [1.5]

    def times(place: Place, networks: dict[str, torch.nn.Module]) -> dict[str, float]:
        by_size = by_parameters(place, networks)
        return {name: ratio * (slow[0] if "network" in by_size else 1.0) for name, ratio in by_size.items()}

    monkeypatch.setattr(slim, "check_budgets", lambda *_: None)
    monkeypatch.setattr(Place, "ratios", times)
    monkeypatch.setattr(methods, "TIME_ATTEMPTS", 1)
    prune = PruneConfig(latency_ratio=(0.9,), cuts=4, round_to=1)
    config = replace(QUICK, method=("residual", "depth"), prune=prune, out=tmp_path / "run")
    with pytest.raises(InfeasibleBudget, match=r"residual: latency_ratio=0\.9 .*--skip-infeasible$"):
        run_slim(config, command="x")
    config = replace(config, skip_infeasible=True)
    record = records.read_record(run_slim(config, command="x")[0])
    assert list(record["refused"]) == ["residual"] and "depth" in record and "residual" not in record
    slow[0] = 1.0
    (tmp_path / "run" / "record.json").unlink()
    record = records.read_record(run_slim(config, command="x")[0])
    assert "refused" not in record and {"residual", "depth"} <= set(record)


@pytest.mark.long
def test_what_mixed_removes_holds_both_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the record names the larger error, of cuts of its groups and of the network."""
    remove, asked = methods.remove_where_faster, []

    def noted(network: torch.nn.Module, example: object, ratios: object, fits: object, **settings: object) -> object:
        asked.append(fits)
        return remove(network, example, ratios, fits, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(methods, "remove_where_faster", noted)
    monkeypatch.setattr(methods, "prove_groups", lambda *_: 0.25)
    monkeypatch.setattr(Place, "ratios", by_parameters)
    prune, none = PruneConfig(macs_ratio=(0.8,), memory_ratio=(0.7,), round_to=1), TrainConfig(epochs=0)
    config = replace(QUICK, method=("mixed",), prune=prune, train=none, finetune=none, out=tmp_path / "run")
    assert records.read_record(run_slim(config, command="x")[0])["mixed"]["cut_error"] == 0.25
    (fits,) = asked
    layer = torch.nn.Conv2d(1, 1, 7, padding=3)
    assert fits(layer) and not fits(torch.nn.Conv2d(1, 64, 1)) and not fits(torch.nn.Sequential(*[layer] * 200))


OTHERS = ("rm", "rm-collapse", "inner", "uniform", "coupled-norm")


@pytest.mark.parametrize("names", few([("mixed", "residual"), OTHERS], ("mixed", "residual")))
def test_the_plan_of_a_record_gives_the_network_of_the_record(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the method; one whose residuals went after the cut has none."""
    monkeypatch.setattr(Place, "ratios", lambda _, networks: {name: 1.0 - (name == "removed") / 2 for name in networks})
    none, prune = TrainConfig(epochs=0), PruneConfig(ratio=(0.5,), round_to=1, importance="magnitude")
    config = replace(QUICK, method=names, prune=replace(prune, reconstruct=False), train=none, finetune=none)
    record = records.read_record(run_slim(replace(config, out=tmp_path), command="x")[0])
    data, found = slim.open_data(config), [network_name(name, names) for name in names]
    without = [name for name in found if "plan" not in record[name]]
    assert without == ["mixed"] * ("mixed" in names) and all(record[name]["removal"]["removed"] for name in without)
    for name in set(found) - set(without):
        plan, dense = SlimPlan.from_dict(record[name]["plan"]), stages.make_dense(config, data, 0)
        made, _ = carry_out(
            dense, plan, [next(iter(data.train.batches(32)))], importance="magnitude", reconstruct=False
        )
        sizes = [
            sorted(tuple(weight.shape) for weight in own.parameters()) for own in (made, artifact.load(tmp_path / name))
        ]
        assert sizes[0] == sizes[1], name


def test_the_default_floor_forbids_no_budget(tmp_path: Path) -> None:
    prune = PruneConfig(macs_ratio=(0.35,), round_to=1)
    run_slim(
        replace(QUICK, method=("inner",), finetune=TrainConfig(epochs=0), prune=prune, out=tmp_path / "r"), command="x"
    )
    record = records.read_record(tmp_path / "r")
    assert 0.3 < record["inner"]["macs"] / record["original"]["macs"] <= 0.35


def test_further_cuts_do_not_apply_the_upper_limit_again() -> None:
    assert scaled(Budget(macs_ratio=0.5, max_fraction=0.8), 0.9) == Budget(macs_ratio=0.45)


@pytest.mark.long
def test_coupled_meets_a_time_where_some_layers_have_no_batch_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Place, "ratios", by_parameters)
    monkeypatch.setattr(stages, "create_network", lambda *_, **__: Small(branching=False))
    config = replace(QUICK, method=("coupled",), prune=PruneConfig(latency_ratio=(0.7,), round_to=1))
    (path,) = run_slim(replace(config, train=TrainConfig(epochs=1), out=tmp_path / "run"), command="x")
    record = records.read_record(path)
    assert record["coupled"]["params"] <= 0.7 * record["original"]["params"]


def test_a_network_that_training_left_without_a_say_is_cut_further_all_the_same() -> None:
    """As by a rate that is too high: it misses its budget in time, and no channel matters any more."""
    torch.manual_seed(0)
    network = short_resnet("", num_classes=10, in_channels=3, width=8).eval()
    job = Job(replace(QUICK, prune=PruneConfig(latency_ratio=(0.5,), round_to=1)), noise(), torch.device("cpu"), 0)
    cutter, budget = make_cutter(network, METHODS["residual"], job), Budget(macs_ratio=0.6)
    half = cutter.once(network, budget)
    with torch.no_grad():
        half.get_parameter([name for name, _ in half.named_parameters()][-2]).zero_()
    less = cutter.once(half, scaled(budget, 0.8))
    assert count_macs(less, job.data.train.example(1)) < count_macs(half, job.data.train.example(1))


def test_images_on_which_nothing_matters_at_first_are_refused() -> None:
    network = torch.nn.Sequential(short_resnet("", num_classes=10, in_channels=3, width=8)).eval()
    torch.nn.init.zeros_(network[0].fc.weight)
    with pytest.raises(DataError, match="every score is 0 on these images"):
        cutter = make_cutter(network, METHODS["residual"], Job(QUICK, noise(), torch.device("cpu"), 0))
        cutter.once(network, Budget(macs_ratio=0.6))


def test_what_mixed_removes_is_exact_for_every_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained after it: bounds of a few images will not do."""
    monkeypatch.setattr(Place, "ratios", lambda _, networks: {name: 1.0 - (name == "removed") / 2 for name in networks})
    torch.manual_seed(0)
    network = short_mobilenet("", num_classes=10, in_channels=3, width=0.5).eval()
    config = replace(QUICK, model="short_mobilenet", finetune=TrainConfig(epochs=0))
    job = Job(config, noise(), torch.device("cpu"), 0, teacher=network)
    budget, files = Budget(ratio=0.3), Files.of(tmp_path, "x")
    kept = slim_network(network, METHODS["residual"], budget, job, files)[0]
    removed, facts = slim_network(network, METHODS["mixed"], budget, job, files)
    assert facts["removal"]["removed"]
    x = 30 * torch.randn(16, 3, 32, 32)
    torch.testing.assert_close(removed(x), kept(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("steps", "cuts", "fraction"), [(88, 30, 0.5), (200, 30, 0.7), (100, 30, 1.0), (10, 30, 0.5)])
def test_gradual_cuts_are_as_many_as_asked_for(steps: int, cuts: int, fraction: float) -> None:
    prune = PruneConfig(macs_ratio=(0.5,), gradual=True, cuts=cuts, cut_fraction=fraction, round_to=1)
    config = replace(QUICK, prune=prune)
    job = Job(config, slim.open_data(config), torch.device("cpu"), 0)
    network = short_resnet("", num_classes=10, in_channels=1, width=4).eval()
    cutter = make_cutter(network, METHODS["rm"], job, Budget(macs_ratio=0.5))
    hook = cutter.hook(Budget(macs_ratio=0.5), steps=steps, epochs=2)
    state = TrainState(network, torch.optim.SGD(network.parameters(), 0.1), TrainConfig(), steps // 2, steps, 0.0)
    assert hook.planned_cuts(state) == min(cuts, round(fraction * steps))


def test_cuts_while_training_do_not_go_down_from_a_plan() -> None:
    network = short_resnet("", num_classes=10, in_channels=3, width=4).eval()
    cutter = make_cutter(
        network, METHODS["rm"], Job(QUICK, noise(), torch.device("cpu"), 0), Budget(macs_ratio=0.5), {"conv1": 2}
    )
    with pytest.raises(ConfigError, match="leave --gradual out"):
        cutter.hook(Budget(macs_ratio=0.5), steps=1, epochs=1)
