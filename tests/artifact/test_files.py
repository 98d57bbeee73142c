"""Artifacts: same outputs bit for bit, names kept, a closed list, and one clear error for every damaged or foreign
file.
"""

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch
import torchvision
from artifact_nets import flat, net, randomise
from marks import few
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmprune.artifact.describe import describe
from rmprune.artifact.files import is_artifact, load, read_extra, save
from rmprune.artifact.rebuild import build
from rmprune.errors import ArtifactError
from rmprune.graph.fold import fold_batch_norms


@pytest.mark.parametrize("make", [flat, net])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_load_gives_the_same_bits(make, dtype, channels_last, tmp_path: Path) -> None:
    model = make().to(dtype).eval()
    x = torch.randn(2, 3, 12, 12).to(dtype) * 4
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    loaded = load(save(model, tmp_path / "a"))
    assert torch.equal(loaded(x), model(x))
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == tensor.dtype and other.stride() == tensor.stride() and torch.equal(other, tensor)
    assert not any(m.training for m in loaded.modules())
    assert isinstance(loaded, nn.Sequential) == (make is flat)


def test_a_loaded_network_trains_like_the_original(tmp_path: Path) -> None:
    model = net().double().train()
    loaded = load(save(model, tmp_path / "a"))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    outputs = []
    for m in (model, loaded):
        torch.manual_seed(1)
        out = m(x)
        out.sum().backward()
        outputs.append(out)
    assert torch.equal(*outputs)
    assert torch.equal(model.stem[1].running_mean, loaded.get_submodule("stem.1").running_mean)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_what_is_shared_stays_shared(tmp_path: Path) -> None:
    loaded = load(save(net(), tmp_path / "a"))
    assert loaded.again is loaded.mix
    assert loaded.twin.weight is loaded.mix.weight
    relu = nn.ReLU()
    twice = load(save(nn.Sequential(relu, nn.Flatten(), relu), tmp_path / "b"))
    assert twice[0] is twice[2]


def test_frozen_batch_norm_stays_in_eval_mode(tmp_path: Path) -> None:
    model = net().train()
    model.stem[1].eval()
    loaded = load(save(model, tmp_path / "a"))
    assert loaded.training and loaded.mix.training and not loaded.get_submodule("stem.1").training


@pytest.mark.parametrize(
    "name",
    few(["resnet18", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "efficientnet_b0"], "mobilenet_v3_small"),
)
def test_torchvision_networks(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(torchvision.models.get_model(name, weights=None)).eval()
    loaded = load(save(model, tmp_path / "a"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))
    assert list(loaded.state_dict()) == list(model.state_dict())


@pytest.mark.long
@pytest.mark.parametrize("name", ["mobilenetv2_050", "regnetx_002"])
def test_timm_networks_come_back_trainable(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=4)).train()
    loaded = load(save(model, tmp_path / "a"))
    assert list(loaded.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))  # batch statistics, and they are remembered
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    folded = fold_batch_norms(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert torch.allclose(folded(x), model.eval()(x), atol=1e-4)


@pytest.mark.long
def test_a_thousand_layers_are_quick(tmp_path: Path) -> None:
    layers = [m for _ in range(350) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    model = nn.Sequential(*layers).eval()
    start = time.process_time()
    loaded = load(save(model, tmp_path / "a"))
    assert time.process_time() - start < 4
    assert len(loaded) == 1050


def test_existing_targets_are_never_lost(tmp_path: Path) -> None:
    target = save(flat(), tmp_path / "a", extra={"accuracy": 0.5})
    assert read_extra(target) == {"accuracy": 0.5}
    with pytest.raises(ArtifactError, match="exists already"):
        save(net(), target)
    save(net(), target, overwrite=True)
    assert load(target).again is not None
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="left alone"):
        save(net(), other, overwrite=True)
    assert (other / "chapter.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "thesis"]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = save(flat(), tmp_path / "a")
    before = (target / "architecture.json").read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rmprune.artifact.files.save_file", full)
    with pytest.raises(ArtifactError, match="No space left"):
        save(net(), target, overwrite=True)
    assert (target / "architecture.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    good = save(net(), tmp_path / "a")
    architecture, weights = good / "architecture.json", good / "model.safetensors"
    text, data = architecture.read_text(), weights.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(ArtifactError, match=words):
            load(good)
        architecture.write_text(text)
        weights.write_bytes(data)

    weights.write_bytes(data[:-5] + b"wrong")
    refused("model.safetensors: damaged")
    weights.write_bytes(b"")
    refused("model.safetensors: damaged")
    weights.unlink()
    refused("model.safetensors: missing")
    architecture.write_text(text[: len(text) // 2])
    refused("architecture.json: damaged")
    architecture.write_text('{"layers": []}')
    refused("not written by rmprune")
    architecture.write_text(text.replace('"schema": 1', '"schema": 99'))
    refused("schema 99")
    architecture.unlink()
    refused("architecture.json: missing")
    with pytest.raises(ArtifactError, match="no such directory"):
        load(tmp_path / "nothing")
    assert is_artifact(good) and not is_artifact(tmp_path)


def test_upsampling_by_the_recomputed_scale_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Upsample(scale_factor=1.5, mode="bilinear", recompute_scale_factor=True)).eval()
    x = torch.randn(2, 3, 5, 5)
    save(model, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a")(x), model(x))
    description = describe(model)
    del description["layers"][0]["args"]["recompute_scale_factor"]  # as files were before it was kept
    assert not torch.equal(build(description)(x), model(x))


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.numbers[1]


def test_parameters_of_whole_numbers_come_back(tmp_path: Path) -> None:
    save(Numbered().eval(), tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert torch.equal(loaded(torch.ones(3)), torch.full((3,), 2.0))
    assert not loaded.get_parameter("numbers").requires_grad


def test_weights_of_another_type_and_a_file_without_a_description_are_refused(tmp_path: Path) -> None:
    save(nn.Sequential(nn.Conv2d(2, 2, 1)).eval(), tmp_path / "a")
    file, weights = tmp_path / "a" / "architecture.json", tmp_path / "a" / "model.safetensors"
    content = json.loads(file.read_text())
    save_file({name: tensor.long() for name, tensor in load_file(weights).items()}, weights)
    content["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    file.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"0\.(weight|bias) is torch\.int64, expected torch\.float32"):
        load(tmp_path / "a")
    file.write_text(json.dumps({"format": content["format"], "schema": content["schema"]}))
    with pytest.raises(ArtifactError, match="description is not a JSON object"):
        load(tmp_path / "a")
