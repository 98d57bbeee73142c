"""What cannot be had is refused before anything is trained, and a comparison goes on without it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from slim_runs import QUICK, Small, by_parameters, noise
from torch import nn
from torchvision.models import shufflenet_v2_x0_5, squeezenet1_1
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from rmprune.config import PruneConfig, TrainConfig
from rmprune.errors import ConfigError, InfeasibleBudget, UnsupportedModel
from rmprune.measure.place import Place
from rmprune.methods.cutter import make_cutter
from rmprune.methods.refuse import check_budgets
from rmprune.methods.table import METHODS
from rmprune.pipelines import stages
from rmprune.pipelines.slim import run_slim
from rmprune.pruning import Budget
from rmprune.removal.remove import nothing_to_remove
from rmprune.report.build import build_report
from rmprune.runs import records
from rmprune.training.job import Job


def test_a_budget_that_no_width_meets_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Place, "ratios", by_parameters)
    prune = PruneConfig(latency_ratio=(0.3,), min_fraction=0.7, round_to=1)
    with pytest.raises(InfeasibleBudget, match=r"the narrowest network .* takes 0\.[3-9]"):
        run_slim(replace(QUICK, method=("residual",), prune=prune, out=tmp_path / "run"), command="x")
    assert not (tmp_path / "run").exists()


def test_the_narrowest_network_is_measured_again_only_where_it_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def least(place: Place, network: object, limit: float) -> float:
        limits.append(limit)
        return 0.4

    monkeypatch.setattr(Place, "least_ratio", least)
    prune = PruneConfig(latency_ratio=(0.9, 0.5, 0.1), round_to=1)
    with pytest.raises(InfeasibleBudget, match=r"latency_ratio=0\.1 cannot be met.* takes 0\.4 of"):
        run_slim(replace(QUICK, method=("residual",), prune=prune, out=tmp_path / "run"), command="x")
    assert limits == [pytest.approx(1.1 * 0.9), pytest.approx(1.1 * 0.1)]


@pytest.mark.long
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
    page = (tmp_path / "report" / "index.html").read_text()
    assert "short_resnet (width 4)" in page and "macs 0.15: without inner, as macs_ratio 0.15" in page
    alone = replace(config, method=("inner",), skip_infeasible=True)
    (wide,) = run_slim(replace(alone, out=tmp_path / "inner"), command="x")
    assert (
        "macs_ratio-0.35" in str(wide)
        and "macs_ratio 0.15, seed 0, is left out: no method can be had: inner" in caplog.text
    )
    assert not any((tmp_path / "inner").rglob("*0.15*/inner"))
    (again,) = run_slim(replace(alone, out=tmp_path / "inner"), command="x")
    assert again == wide
    narrow_alone = replace(alone, prune=replace(prune, macs_ratio=(0.15, 0.14)), out=tmp_path / "no")
    with pytest.raises(InfeasibleBudget, match=r"no method can be had: inner: macs_ratio 0\.15"):
        run_slim(narrow_alone, command="x")
    assert not (tmp_path / "no").exists()


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=10).eval()


@pytest.mark.parametrize(
    ("create", "method", "reason"),
    [
        (squeezenet1_1, "coupled", "no batch norm"),
        (shufflenet_v2_x0_5, "coupled", "Torch-Pruning cannot follow this network"),
        (convnext, "residual", "--no-reconstruct"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_training(
    create: Callable[[], nn.Module], method: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise()
    monkeypatch.setattr(stages, "create_network", lambda *_, **__: create())
    monkeypatch.setattr(stages, "tune", lambda *_, **__: pytest.fail("trained for nothing"))
    config = replace(QUICK, method=(method,), prune=PruneConfig(macs_ratio=(0.5,)))
    with pytest.raises(UnsupportedModel, match=reason):
        run_slim(replace(config, out=tmp_path / "run"), command="x", load=lambda *_: data)
    assert not (tmp_path / "run").exists()


def test_a_network_that_no_file_can_hold_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "create_network", lambda *_, **__: Small(branching=True))
    monkeypatch.setattr(stages, "tune", lambda *_, **__: pytest.fail("trained for nothing"))
    with pytest.raises(UnsupportedModel, match="trace"):
        run_slim(replace(QUICK, method=("uniform",), out=tmp_path / "run"), command="x")
    assert not (tmp_path / "run").exists()


def test_only_where_nothing_can_be_removed_is_the_method_without_removal_named() -> None:
    """By the kind of error: another may say the same words."""
    job = Job(QUICK, noise(), torch.device("cpu"), 0)

    def said(error: UnsupportedModel) -> str:
        def start(name: str) -> nn.Module:
            raise error

        with pytest.raises(UnsupportedModel) as refused:
            check_budgets(start, {"rm": METHODS["rm"]}, [Budget(ratio=0.5)], job)
        return str(refused.value)

    other = "layer 'no residual to remove' cannot be read"
    assert said(UnsupportedModel(other)) == other
    assert said(nothing_to_remove({})).endswith("of one source; --method residual prunes the network as it is")


def test_cut_while_training_layers_must_be_fittable_only_where_a_cut_at_once_may_follow() -> None:
    network, data = convnext(), noise()
    config = replace(QUICK, prune=replace(QUICK.prune, gradual=True))
    cutter = make_cutter(network, METHODS["residual"], Job(config, data, torch.device("cpu"), 0))
    cutter.check(once=False)
    with pytest.raises(UnsupportedModel, match="--no-reconstruct"):
        cutter.check(once=True)


def test_a_share_of_each_network_s_own_channels_is_no_equal_cost(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use --macs-ratio or --latency-ratio"):
        run_slim(
            replace(QUICK, method=("mixed-auto",), prune=PruneConfig(ratio=(0.5,)), out=tmp_path / "run"), command="x"
        )
