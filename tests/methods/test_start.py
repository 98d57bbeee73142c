"""Networks that methods start from: residuals removed and blocks collapsed, as the record says."""

from dataclasses import replace
from pathlib import Path

import pytest
from slim_runs import QUICK, convolutions, inverted

import rmprune
from rmprune.config import PruneConfig, RemovalConfig, TrainConfig
from rmprune.data.load import load_dataset
from rmprune.errors import UnsupportedModel
from rmprune.measure.place import Place
from rmprune.pipelines import stages
from rmprune.pipelines.slim import run_slim
from rmprune.pruning.carry_out import carry_out
from rmprune.pruning.plan import SlimPlan
from rmprune.runs import records


@pytest.mark.long
def test_residuals_are_removed_only_within_a_budget_of_macs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "ratios", lambda place, networks: {n: 0.5 if n == "removed" else 1.0 for n in networks})
    config = replace(QUICK, method=("mixed",), train=TrainConfig(epochs=0), finetune=TrainConfig(epochs=0))
    run_slim(replace(config, out=tmp_path / "macs"), command="x")
    record = records.read_record(tmp_path / "macs")
    assert record["mixed"]["macs"] <= 0.5 * record["original"]["macs"] and record["mixed"]["removal"]["removed"] == []
    run_slim(replace(config, prune=PruneConfig(ratio=(0.3,), round_to=1), out=tmp_path / "ratio"), command="x")
    assert records.read_record(tmp_path / "ratio")["mixed"]["removal"]["removed"] == ["layer1.0", "layer2.0"]


@pytest.mark.long
def test_collapsed_blocks_are_pruned_and_the_record_says_which(tmp_path: Path) -> None:
    methods = ("rm-collapse", "mixed-collapse", "coupled-collapse", "coupled-half-collapse")
    none = TrainConfig(epochs=0)
    (path,) = run_slim(replace(QUICK, method=methods, train=none, finetune=none, out=tmp_path / "run"), command="x")
    record = records.read_record(path)
    assert set(records.networks(record)) == {"original", *methods} and record["removal"] is None
    blocks = {"layer1.0", "layer2.0"}
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
    assert sizes["rm-collapse"] == 3 and sizes["coupled-collapse"] == 4  # a shortcut is a convolution
    assert sizes["mixed-collapse"] == 3 + 1 + (kept != {"layer1.0"}) and sizes["coupled-half-collapse"] == 3 + 1 + 1
    for name in methods:
        assert record[name]["macs"] <= 0.5 * record["original"]["macs"]
    with pytest.raises(UnsupportedModel, match="no block to collapse"):
        run_slim(replace(QUICK, model="preact_resnet8", method=("rm-collapse",), out=tmp_path / "no"), command="x")
    assert not (tmp_path / "no").exists()


@pytest.mark.long
def test_the_v1_form_and_how_residuals_go_are_what_the_record_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused everywhere, copies beside the activations, one block kept; the recorded plan makes a network of these widths again."""
    monkeypatch.setattr(stages, "create_network", lambda *_, **__: inverted())
    none, removal = TrainConfig(epochs=0), RemovalConfig(keep=("3",), form="slice")
    config = replace(QUICK, method=("rm", "rm-v1"), removal=removal, train=none, finetune=none, out=tmp_path)
    record = records.read_record(run_slim(config, command="x")[0])
    assert (record["pruned"]["plan"]["fuse"], record["rm-v1"]["plan"]["fuse"]) == ("cheaper", "always")
    assert set(record["rm-v1"]["removal"]["kept"]) == set(record["removal"]["kept"]) == {"3"}
    plain, fused = (rmprune.load(tmp_path / name) for name in ("plain", "fused"))
    assert convolutions(fused) < convolutions(plain)
    assert not any(type(module).__name__ == "Sequential" for module in (plain, fused))  # slices are no chain
    data = load_dataset(config.data)
    batches = list(data.train.batches(128))
    plan = SlimPlan.from_dict(record["rm-v1"]["plan"])
    again, facts = carry_out(stages.make_dense(config, data, 0), plan, batches, removal=removal)
    assert facts["plan"] == plan.to_dict()
    assert rmprune.count_macs(again, data.train.example(1)) == pytest.approx(record["rm-v1"]["macs"], rel=0.02)
