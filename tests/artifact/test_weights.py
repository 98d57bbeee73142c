import argparse
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rmprune.artifact import files as artifact
from rmprune.artifact.weights import load_checkpoint_into, read_state_dict, start_from
from rmprune.errors import ArtifactError
from rmprune.models.families import create_network


def net(width: int = 4) -> torch.nn.Module:
    return create_network("resnet8", num_classes=3, input_shape=(1, 8, 8), width=width)


@pytest.mark.parametrize("form", ["artifact", "safetensors", "pt", "wrapped"])
def test_weights_from_every_form(tmp_path: Path, form: str) -> None:
    trained = net()
    path = tmp_path / f"weights.{form}"
    if form == "artifact":
        artifact.save(trained, path)
    elif form == "safetensors":
        save_file(trained.state_dict(), path)
    else:
        torch.save(trained.state_dict() if form == "pt" else {"state_dict": trained.state_dict(), "epoch": 3}, path)
    loaded = load_checkpoint_into(net(), path, "resnet8").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trained.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(net(8).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ArtifactError, match="weights of another network than resnet8"):
        load_checkpoint_into(net(), tmp_path / "other.pt", "resnet8")


def test_a_missing_and_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such checkpoint"):
        load_checkpoint_into(net(), tmp_path / "none.pt", "resnet8")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 nothing else")
    (tmp_path / "empty.pt").touch()
    for name in ("damaged.pt", "empty.pt"):
        with pytest.raises(ArtifactError, match=r"cannot be read|it is empty"):
            read_state_dict(tmp_path / name)


FORMS = {
    "lightning": lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}, "callbacks": {}},
    "timm": lambda state: {"state_dict": state, "state_dict_ema": dict(state), "args": argparse.Namespace(lr=0.1)},
    "average": lambda state: {
        "model_ema": {f"module.{k}": v for k, v in state.items()} | {"n_averaged": torch.ones(())}
    },
    "compiled": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "unknown": lambda state: {"weights": state, "epoch": 3},
    "frozen norms": lambda state: state | {"bn9.num_batches_tracked": torch.tensor(3)},
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_training_frameworks(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    trained = net().state_dict()
    torch.save(FORMS[form](trained), tmp_path / "a.ckpt")
    with caplog.at_level("INFO"):
        loaded = load_checkpoint_into(net(), tmp_path / "a.ckpt", "resnet8").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trained.items())
    assert ("state_dict is taken, state_dict_ema left out" in caplog.text) == (form == "timm")


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_file_is_read_as_what_it_is_not_as_its_name_says(tmp_path: Path, form: str) -> None:
    trained = net().state_dict()
    other = {"pt": "safetensors", "safetensors": "pt"}[form]
    (torch.save if form == "pt" else save_file)(trained, tmp_path / f"a.{other}")
    assert torch.equal(read_state_dict(tmp_path / f"a.{other}")["fc.weight"], trained["fc.weight"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "not a regular file"),
        (b"<!DOCTYPE html><html><title>404", "begins with '<!DOCTYPE html><html><title>404'.*download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git lfs pull"),
        (lambda state: {"teacher": state, "student": state}, r"several networks \(teacher, student\)"),
        (
            lambda state: state | {"fc.bias": torch.full((3,), math.nan)},
            "a.pt: NaN or infinite numbers in fc.bias, as of",
        ),
        (lambda state: state | {"fc.bias": torch.tensor([0, 1, -math.inf])}, "numbers in fc.bias"),
        (
            lambda state: state | {"fc.bias": torch.tensor([0, 1, 1e300], dtype=torch.float64)},
            "numbers in fc.bias",
        ),
        (
            lambda state: {key: value / 0 for key, value in state.items()},
            "numbers in conv1.weight, bn1.weight, bn1.bias, bn1.running_mean and .* more, .*take an earlier file",
        ),
        (lambda state: state | {"fc.bias": torch.ones(3, dtype=torch.int8)}, "whole numbers there: fc.bias"),
    ],
)
@pytest.mark.parametrize("load", [load_checkpoint_into, lambda model, path, name: start_from(model, str(path), name)])
def test_what_is_no_weights_is_named_for_what_it_is(tmp_path: Path, content, told: str, load) -> None:
    path = tmp_path / "a.pt"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content(net().state_dict()), path)
    with pytest.raises(ArtifactError, match=told) as caught:
        load(net(), path, "resnet8")
    assert "\n" not in str(caught.value)


class Masked(nn.Module):
    """Its mask is infinite, and meant to be."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))


def test_what_may_be_infinite_and_what_is_not_taken(tmp_path: Path) -> None:
    there = Masked().state_dict()
    torch.save(
        {f"net.{key}": value for key, value in there.items()} | {"loss": torch.tensor(math.nan)}, tmp_path / "a.pt"
    )
    model = Masked()
    assert start_from(model, str(tmp_path / "a.pt"), "masked") == "loss beside net.* left out"
    assert torch.equal(model.layer.weight, there["layer.weight"])
    broken = net()
    nn.init.constant_(broken.fc.weight, math.nan)  # in a head that is made anew
    torch.save(broken.state_dict(), tmp_path / "b.pt")
    start_from(
        create_network("resnet8", num_classes=5, input_shape=(1, 8, 8), width=4), str(tmp_path / "b.pt"), "resnet8"
    )


def test_a_broken_artifact_is_no_start(tmp_path: Path) -> None:
    broken = net()
    nn.init.constant_(broken.fc.weight, math.inf)
    artifact.save(broken, tmp_path / "net")
    with pytest.raises(ArtifactError, match=r"net: NaN or infinite numbers in fc\.weight"):
        load_checkpoint_into(net(), tmp_path / "net", "resnet8")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["model.safetensors"], r"no artifact of rmprune; give the file in it, \S*hub/model.safetensors$"),
        (["pytorch_model.bin", "model.safetensors"], r"hub/model.safetensors \(also there: pytorch_model.bin\)$"),
        (["pytorch_model.bin"], r"hub/pytorch_model.bin$"),
        (["optimizer.pt", "pytorch_model.bin"], r"hub/pytorch_model.bin \(also there: optimizer.pt\)$"),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            r"a network in pieces \(model-00001-of-00002.safetensors, .*save them as one file",
        ),
        ([], r"architecture.json: missing; this is not an rmprune artifact"),
    ],
)
def test_a_folder_of_the_hugging_face_hub_names_its_file(tmp_path: Path, names: list[str], told: str) -> None:
    (tmp_path / "hub").mkdir()
    for name in ("config.json", *names):
        (tmp_path / "hub" / name).write_text("{}")
    with pytest.raises(ArtifactError, match=told):
        start_from(net(), str(tmp_path / "hub"), "resnet8")


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ArtifactError, match="not a plain state dict"):
        read_state_dict(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_what_training_cannot_start_from_says_what_can(tmp_path: Path) -> None:
    artifact.save(net(), tmp_path / "run" / "dense")
    (tmp_path / "run" / "dense" / "model.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    with pytest.raises(
        ArtifactError, match=r"an ONNX file, which is not trained again; give the artifact or the state dict"
    ):
        read_state_dict(tmp_path / "run" / "dense" / "model.onnx")
    with pytest.raises(
        ArtifactError, match=rf"{tmp_path / 'run'}: no artifact itself; give one of those in it: .*dense$"
    ):
        artifact.load(tmp_path / "run")


def test_small_images_get_a_small_stem() -> None:
    small = create_network("resnet18", num_classes=10, input_shape=(1, 28, 28))
    large = create_network("resnet18", num_classes=10, input_shape=(3, 224, 224))
    assert small.conv1.stride == (1, 1) and large.conv1.stride == (2, 2)


def test_two_networks_behind_prefixes_as_short_are_refused(tmp_path: Path) -> None:
    """Which of them was taken went by the order of a set, that is by chance."""
    two = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in net().state_dict().items()}
    torch.save(two, tmp_path / "two.pt")
    for load in (load_checkpoint_into, lambda model, path, name: start_from(model, str(path), name)):
        with pytest.raises(ArtifactError, match=r"holds several networks \(student\., teacher\.\)"):
            load(net(), tmp_path / "two.pt", "resnet8")
