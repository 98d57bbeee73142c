"""`rmprune.slim`: networks and loaders of one's own, with and without a loss; mistakes are said before anything is trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import few
from own_batches import (
    Angles,
    Asking,
    Both,
    Note,
    Over,
    Viewed,
    broken,
    by_the_hour,
    classes,
    drawn,
    labelled,
    once,
    pixels,
    to_angles,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rmprune
from rmprune.config import MeasureConfig, PruneConfig, TrainConfig
from rmprune.errors import ArtifactError, ConfigError, DataError, InfeasibleBudget, RmpruneError, UnsupportedModel
from rmprune.pipelines.one_call import Slimmed
from rmprune.report.build import build_report

QUICK: dict[str, Any] = {
    "measure": MeasureConfig(backends=("eager",), threads=(1,), batch_sizes=(1,), seconds=0, min_rounds=3),
    "prune": PruneConfig(round_to=1),
}


@pytest.fixture(scope="module")
def regression() -> tuple[Angles, Slimmed]:
    torch.manual_seed(0)
    model = Angles().eval()
    return model, rmprune.slim(
        model,
        pixels(),
        pixels(),
        macs_ratio=0.6,
        loss=to_angles,
        finetune=TrainConfig(epochs=3, learning_rate=0.02, warmup_epochs=0, distillation=0.5),
        **QUICK,
    )


def test_a_regression_net_by_its_own_loss(regression: tuple[Angles, Slimmed]) -> None:
    model, result = regression
    assert result.table.columns[0] == "loss" and list(result.table.index) == ["original", "removed", "pruned"]
    with torch.no_grad():
        losses = [
            float(torch.stack([to_angles(net, batch) for batch in pixels()]).mean()) for net in (model, result.model)
        ]
    assert losses == pytest.approx([result.table.loss["original"], result.table.loss["pruned"]], rel=1e-4)
    assert (
        result.table.loss["removed"] == pytest.approx(losses[0], rel=1e-4) and result.table.macs_ratio["pruned"] <= 0.6
    )
    assert list(result.plan.blocks.values()) == ["remove"]
    assert "<table" in result._repr_html_() and "pruned" in repr(result)
    epochs = [json.loads(line) for line in (result.directory / "log.jsonl").read_text().splitlines()]
    assert [epoch["validation_accuracy"] for epoch in epochs] == [None] * 3
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


def test_what_is_saved_is_what_was_measured(regression: tuple[Angles, Slimmed], tmp_path: Path) -> None:
    _, result = regression
    folder = result.save(tmp_path / "kept")
    x = torch.rand(2, 3, 8, 8)
    assert (
        torch.equal(rmprune.load(folder / "pruned")(x), result.model(x))
        and (folder / "pruned" / "model.onnx").is_file()
    )
    record = json.loads((folder / "record.json").read_text())
    assert record["pruned"]["loss"] == result.table.loss["pruned"] and record["command"].startswith(
        "rmprune.slim(Angles"
    )
    with pytest.raises(ArtifactError, match="exists already"):
        result.save(folder)
    with pytest.raises(ArtifactError, match="a loss of their own"):  # nothing to draw without accuracy
        build_report([folder], tmp_path / "report", "x")


@pytest.mark.parametrize("loss", few([None, classes], classes))
def test_a_network_that_writes_over_its_images_is_slimmed_like_another(loss: Any) -> None:
    torch.manual_seed(0)
    model, data = Over().eval(), labelled(2)
    tuning = TrainConfig(epochs=1, warmup_epochs=0, distillation=0.5)
    made = rmprune.slim(model, data, data, macs_ratio=0.6, loss=loss, method="residual", finetune=tuning, **QUICK)
    for batch, before in zip(data, labelled(2), strict=True):
        assert all(torch.equal(own, x) for own, x in zip(batch, before, strict=True))
    for network, name in ((model, "original"), (made.model, "residual")):
        with torch.no_grad():
            truly = torch.stack([classes(network, batch) for batch in labelled(2)]).mean()
        assert made.record[name]["validation"]["loss"] == pytest.approx(float(truly), rel=1e-5)


@pytest.mark.parametrize("method", few(["rm", "residual", "depth", "coupled"], "residual"))
def test_a_network_that_views_maps_as_they_lie(method: str) -> None:
    model, finetune = Viewed().eval(), TrainConfig(epochs=1, channels_last=method != "coupled")
    result = rmprune.slim(model, labelled(), labelled(), macs_ratio=0.7, method=method, finetune=finetune, **QUICK)
    assert result.table.macs_ratio["pruned"] <= 0.7
    assert result.model(labelled()[0][0]).shape == (8, 4)


@pytest.mark.long
def test_a_torchvision_network_with_a_loader_of_its_own(tmp_path: Path) -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    x, y, _ = (torch.cat(parts) for parts in zip(*labelled(), strict=True))
    loader = DataLoader(TensorDataset(x.repeat(1, 1, 4, 4), y), batch_size=8)
    state = {name: tensor.clone() for name, tensor in model.eval().state_dict().items()}
    kwargs: dict[str, Any] = {
        "ratio": 0.7,
        "method": "uniform",
        "epochs": np.int64(1),  # as numpy and torch give them
        "device": torch.device("cpu"),
        "learning_rate": 1e-3,
        "out": tmp_path / "run",
        **QUICK,
    }
    first = rmprune.slim(model, loader, loader, **kwargs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()) and not model.training
    assert first.table.params_ratio["pruned"] < 0.5 and list(first.table.index) == ["original", "pruned"]
    with pytest.raises(ConfigError, match="another network"):
        rmprune.slim(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).eval(), loader, loader, **kwargs)


HALF = {"macs_ratio": 0.5}
MISTAKES: dict[str, tuple[dict[str, Any], type[RmpruneError], str]] = {
    "training mode": ({"model": Angles().train()}, ConfigError, "training mode"),
    "no weights": ({"model": nn.ReLU().eval()}, ConfigError, "has no weights"),
    "no budget": (
        {"macs_ratio": None},
        ConfigError,
        "exactly one of ratio=, macs_ratio=, latency_ratio=, memory_ratio=; got none",
    ),
    "two budgets": ({"ratio": 0.5}, ConfigError, "got ratio, macs_ratio"),
    "a budget outside": ({"macs_ratio": 1.5}, ConfigError, "between 0 and 1"),
    "an impossible budget": ({"macs_ratio": 0.001}, InfeasibleBudget, "macs_ratio"),
    "an iterator": ({"train": once()}, DataError, "train is of type generator"),
    "no batches": ({"validation": []}, DataError, "validation holds no batch"),
    "dicts without a loss": ({"train": pixels()}, DataError, "train: data: a batch is a dict of pixels, angles"),
    "labels of no class": ({"validation": labelled(classes=8)}, DataError, "validation: data: labels from 0 to 7"),
    "labels of numbers": ({"train": [(torch.randn(2, 3, 8, 8), torch.rand(2, 1))]}, DataError, "train: .*pass loss="),
    "sparse images": (
        {"train": [(x.to_sparse(), y) for x, y, *_ in labelled()]},
        DataError,
        "train: data: a batch holds sparse .*to_dense",
    ),
    "a loss without the model": ({"loss": broken}, DataError, "train: loss: no gradient"),
    "no trace": ({"model": Asking().eval()}, UnsupportedModel, "Asking"),
    "int8": ({"measure": MeasureConfig(backends=("eager", "onnxruntime-int8"))}, ConfigError, "onnxruntime-int8 count"),
    "auto by a loss": ({"method": "auto", "loss": to_angles}, ConfigError, "take 'rm' or 'residual'"),
    "no network": ({"model": 3}, ConfigError, "model is of type int"),
    "settings of another kind": ({"prune": {"round_to": 8}}, ConfigError, "prune is of type dict; give a PruneConfig"),
    "two inputs": (
        {"model": Both().eval()},
        ConfigError,
        r"forward of Both takes one, other; slim takes networks of one input.*torch\.cat",
    ),
    "a loss that calls it with two": (
        {"loss": lambda model, batch: model(batch[0], None).mean()},
        DataError,
        r"loss: failed .*called as loss\(model, batch\), where a batch is \(a tensor of sizes",
    ),
    "a loss that calls it by name": (
        {"loss": lambda model, batch: model(x=batch[0]).mean()},
        DataError,
        r"loss: it calls the network with \(x=\); call it with one tensor, model\(images\)",
    ),
    "a loss of another arity": ({"loss": lambda batch: 0}, DataError, r"it is called as loss\(model, batch\)"),
    "a loss of outputs and targets": (
        {"loss": nn.CrossEntropyLoss()},
        DataError,
        r"it is called as loss\(model, batch\)",
    ),
    "a budget that is a string": ({"macs_ratio": "0.5"}, ConfigError, r"^macs_ratio is '0.5'; give float"),
    "budgets in a tuple": ({"macs_ratio": (0.5, 0.3)}, ConfigError, r"^macs_ratio is \(0.5, 0.3\); give float"),
    "no device": ({"device": None}, ConfigError, "device is of type NoneType"),
    "no such method": ({"method": "magic"}, ConfigError, "unknown method 'magic'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_said_before_anything_is_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, kind, said = MISTAKES[name]
    monkeypatch.setattr("rmprune.methods.slim.tune", lambda *_, **__: pytest.fail("trained"))
    model = rmprune.models.create("resnet8", num_classes=4, width=4).eval()
    call = {"model": model, "train": labelled(), "validation": labelled(), **HALF, "out": tmp_path / "run"} | changes
    with pytest.raises(kind, match=said):
        rmprune.slim(**QUICK | call)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_out_gives_back_its_finished_run_and_refuses_other_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = rmprune.models.create("resnet8", num_classes=4, width=4).eval()
    call: dict[str, Any] = {"macs_ratio": 0.7, "method": "rm", "epochs": 0, "out": tmp_path / "run", **QUICK}
    first = rmprune.slim(model, labelled(), labelled(), **call)
    again = rmprune.slim(model, labelled(), labelled(), **call)
    assert again.record == first.record
    others = [(x + 1, *rest) for x, *rest in labelled()]
    with pytest.raises(ConfigError, match="other settings"):
        rmprune.slim(model, labelled(), others, **call)


@pytest.mark.parametrize("method", ["auto", "depth"])
def test_what_weighs_blocks_by_class_scores_refuses_a_loss_of_one_s_own(method: str) -> None:
    with pytest.raises(ConfigError, match=f"method '{method}' weighs blocks by class scores"):
        rmprune.slim(Angles().eval(), pixels(), pixels(), macs_ratio=0.6, loss=to_angles, method=method, **QUICK)


def test_out_goes_on_with_the_same_loaders_and_loss_alone(tmp_path: Path) -> None:
    """As far as they can be told apart: what differs each time, of itself, is no reason to refuse."""
    model = Angles().eval()
    finetune = TrainConfig(epochs=0, warmup_epochs=0)
    call: dict[str, Any] = {"ratio": 0.5, "method": "uniform", "finetune": finetune, **QUICK}

    def slim(out: str, train: Any, loss: Any, validation: Any = None) -> Slimmed:
        return rmprune.slim(model, train, validation or pixels(), loss=loss, out=tmp_path / out, **call)

    first = slim("a", pixels(), to_angles)
    assert slim("a", pixels(), lambda model, batch: to_angles(model, batch)).record == first.record
    brighter = [batch | {"pixels": batch["pixels"] // 2 + 100} for batch in pixels()]
    with pytest.raises(ConfigError, match=r"other training batches \(3, now 3; the first one differs\)"):
        slim("a", brighter, to_angles)
    with pytest.raises(ConfigError, match=r"other training batches \(3, now 4; the first one agrees\)"):
        slim("a", pixels(4), to_angles)
    for other in (lambda model, batch: 2 * to_angles(model, batch), drawn):
        with pytest.raises(
            ConfigError, match=r"holds the run of another loss= \(of the first batch of validation it was"
        ):
            slim("a", pixels(), other)
    with pytest.raises(ConfigError, match="other settings"):
        slim("a", pixels(), to_angles, brighter)

    def shuffled() -> DataLoader[Any]:
        """Image by image: of three whole batches the first would be the same by chance, at times."""
        images = [
            dict(zip(batch, both, strict=True)) for batch in pixels() for both in zip(*batch.values(), strict=True)
        ]
        return DataLoader(images, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(torch.seed()))

    def noted() -> list[Any]:
        return [batch | {"note": Note()} for batch in pixels()]

    for out, train, loss, validation in (("b", shuffled, by_the_hour, pixels), ("c", noted, drawn, noted)):
        first = slim(out, train(), loss, validation())
        assert slim(out, train(), loss, validation()).record == first.record
