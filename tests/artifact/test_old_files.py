"""Files written by the code of 0.1.0 (tests/files/0.1, see write.py there) are read by today's: artifacts, checkpoints, runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rmprune
from rmprune.artifact import read_extra
from rmprune.cli import main
from rmprune.config import DataConfig, SlimConfig, TrainConfig
from rmprune.config.toml import differences, from_toml, to_toml
from rmprune.data import load_dataset
from rmprune.pruning import Budget, GradualPruner
from rmprune.report.build import build_report
from rmprune.runs.records import networks, read_record
from rmprune.training import fit

OLD = Path(__file__).parents[1] / "files" / "0.1"
FACTS: dict[str, dict[str, Any]] = json.loads((OLD / "artifacts" / "facts.json").read_text())


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training moves; statistics of batch norms are measured at an epoch's end now."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", FACTS)
def test_an_old_artifact_gives_the_same_outputs_bit_for_bit(name: str) -> None:
    tensors, facts = load_file(OLD / "artifacts" / "outputs.safetensors"), FACTS[name]
    model = rmprune.load(OLD / "artifacts" / name)
    with torch.no_grad():
        assert torch.equal(model(tensors[f"{name}.input"]), tensors[f"{name}.output"])
    assert model.training == facts["training"] and read_extra(OLD / "artifacts" / name) == {"name": name}
    state = {key: [list(t.shape), str(t.dtype), list(t.stride())] for key, t in model.state_dict().items()}
    assert state == facts["state"]
    assert [key for key, parameter in model.named_parameters() if not parameter.requires_grad] == facts["frozen"]
    if name == "tied":
        assert model.second.weight is model.first.weight


@pytest.mark.parametrize("name", ["train", "pruned"])
def test_an_old_checkpoint_goes_on_to_where_the_old_code_ended(tmp_path: Path, name: str) -> None:
    """It was written after step 6 of 8; "pruned" holds an architecture, cut after steps 2 and 4, and the pruner's state."""
    shutil.copy(OLD / "checkpoints" / f"{name}.pt", tmp_path)
    network = rmprune.load(OLD / "checkpoints" / "start")
    data = load_dataset(DataConfig(train_images=64, batch_size=16))
    pruner = GradualPruner(
        network, data.train.example(1), Budget(ratio=0.5, min_channels=2), prune_epochs=1, every=2
    )  # fmt: skip
    steps: list[int] = []

    class Hook:
        def __call__(self, state: Any) -> None:
            steps.append(state.step)
            if name == "pruned":
                pruner(state)

        def load_state_dict(self, saved: Any) -> None:
            pruner.load_state_dict(saved)

        state_dict = pruner.state_dict

    config = TrainConfig(epochs=2, precision="float32", learning_rate=0.01)
    file = tmp_path / f"{name}.pt"
    finished = fit(network, data, config, seed=0, hook=Hook(), checkpoint=file, label=name, progress=False)
    assert steps == [7, 8]
    end = load_file(OLD / "checkpoints" / f"{name}-end.safetensors")
    found = weights(finished)
    torch.testing.assert_close(found, {key: end[key] for key in found}, rtol=1e-3, atol=1e-4)
    assert (pruner.done and pruner.structure.units != pruner.first.units) == (name == "pruned")


def test_old_settings_are_read(tmp_path: Path) -> None:
    config = from_toml(SlimConfig, OLD / "runs" / "finished" / "config.toml")
    assert (config.model, config.method, config.prune.ratio) == ("resnet8", ("rm", "residual"), (0.5,))
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert differences(from_toml(SlimConfig, tmp_path / "config.toml"), config) == []


def test_an_old_record_is_read_and_reported(tmp_path: Path) -> None:
    record = read_record(OLD / "runs" / "finished")
    assert list(networks(record)) == ["original", "plain", "pruned", "residual"] and record["removal"]["removed"]
    names = {
        path.name for path in build_report(OLD / "runs" / "finished", tmp_path / "report", "python -m rmprune report")
    }
    assert {"results.csv", "accuracy-time.png", "index.html"} <= names
    assert (tmp_path / "report" / "results.csv").read_text().count("\n") == 5


@pytest.mark.long
def test_an_old_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    """It had trained, and slimmed by `rm`; it was stopped after step 5 of 8 of fine-tuning what `residual` had cut."""
    run = tmp_path / "run"
    shutil.copytree(OLD / "runs" / "interrupted", run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".safetensors", ".jsonl")}
    command = read_record(OLD / "runs" / "finished")["command"].split()
    with pytest.raises(
        SystemExit
    ):  # fine-tuning has another rate and a warm-up by default since: said, and nothing is touched
        main([*command[3 : command.index("--out")], "--out", str(run)])
    settings = ["--finetune.learning-rate", "0.02", "--finetune.warmup-epochs", "0"]
    main([*command[3 : command.index("--out")], *settings, "--out", str(run)])
    for path, content in before.items():
        assert path.read_bytes().startswith(content), f"{path} was made again"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(line["label"], line["epoch"]) for line in log[-2:]] == [("residual", 1), ("residual", 2)]
    expected = weights(rmprune.load(OLD / "runs" / "finished" / "residual"))
    torch.testing.assert_close(weights(rmprune.load(run / "residual")), expected, rtol=1e-3, atol=1e-4)
    assert list(networks(read_record(run))) == ["original", "plain", "pruned", "residual"]
