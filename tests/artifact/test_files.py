"""Artifacts: same outputs bit for bit, names kept, a closed list, and one clear error for every damaged or foreign
file.
"""

import copy
import hashlib
import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmprune.artifact import onnx as onnx_export
from rmprune.artifact.describe import describe
from rmprune.artifact.files import is_artifact, load, read_extra, save
from rmprune.artifact.onnx import export_onnx, rounding
from rmprune.artifact.rebuild import build
from rmprune.errors import ArtifactError, NotEquivalent, UnsupportedModel
from rmprune.graph.fold import fold_batch_norms


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random batch-norm statistics and affine parameters: fresh ones hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1.0, 1.0),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.3, 1.5),
                (module.bias.data, -1.0, 1.0),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * (high - low) + low)
    return model


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 1),
        nn.Hardswish(),
        nn.Conv2d(8, 8, (3, 5), stride=2, padding="valid", groups=4),
        nn.PReLU(8),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d((1, None)),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


class Net(nn.Module):
    """Branches, functions, methods, direct parameters, a non-persistent buffer, a shared layer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.mix = nn.Conv2d(6, 6, 3, padding=1)
        self.again = self.mix
        self.twin = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.twin.weight = self.mix.weight
        self.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5, requires_grad=False)
        self.register_buffer("shift", torch.rand(6, 1, 1), persistent=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x), inplace=True)
        y = self.again(torch.relu(self.mix(x))) + x * self.gamma
        y += self.twin(F.pad(x, (1, 0, 1, 0)))[:, :, 1:, 1:]
        y = F.max_pool2d(y, 2) + self.shift
        y = torch.cat([y, F.hardtanh(y, -0.5, 0.5)], dim=1)
        return self.head(self.drop(F.adaptive_avg_pool2d(y, 1).view(y.size(0), -1)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net())


def flat() -> nn.Module:
    torch.manual_seed(0)
    model = chain()
    model.eval()(torch.zeros(1, 3, 12, 12))
    return randomise(model)


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


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "efficientnet_b0"])
def test_torchvision_networks(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(torchvision.models.get_model(name, weights=None)).eval()
    loaded = load(save(model, tmp_path / "a"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))
    assert list(loaded.state_dict()) == list(model.state_dict())


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


def test_describe_is_json_and_build_reads_it_back() -> None:
    for model in (flat(), net()):
        description = json.loads(json.dumps(describe(model), allow_nan=False))
        assert describe(build(description)) == description


def test_describe_leaves_the_model_alone() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    keys = set(model.__dict__)
    describe(model)
    assert set(model.__dict__) == keys
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_thousand_layers_are_quick(tmp_path: Path) -> None:
    layers = [m for _ in range(1200) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    model = nn.Sequential(*layers).eval()
    start = time.perf_counter()
    loaded = load(save(model, tmp_path / "a"))
    assert time.perf_counter() - start < 20
    assert len(loaded) == 3600


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class MyConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.erfinv(super().forward(input))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_hook(lambda m, i, o: o * 2)
    return model


def surgically_damaged() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model[0].weight = nn.Parameter(torch.zeros(2, 3, 1, 1))
    return model


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Odd(), "fft"),
        (Branching(), "control flow"),
        (nn.Sequential(MyConv(3, 3, 1)), "erfinv"),
        (hooked(), "hooks"),
        (surgically_damaged(), "do not fit"),
        (Functional().train(), "training mode"),
        (nn.LSTM(3, 3), "trace"),
    ],
)
def test_outside_the_closed_list_is_refused_by_name(model: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


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


def edit(description: dict, where: str, **values: object) -> dict:
    entry = next(e for e in description["nodes"] + description["layers"] if e["name"] == where)
    entry.update(values)
    return description


@pytest.mark.parametrize(
    ("where", "values", "words"),
    [
        ("stem.0", {"type": "os.system"}, "not a layer type"),
        ("stem.0", {"args": {"in_channels": 3}}, "not exactly"),
        ("stem.1", {"type": "ReLU", "args": {"inplace": 3}}, "out of range"),
        ("stem.0", {"name": "stem.0'); import os; ('"}, "not a valid name"),
        ("again", {"same_as": "nowhere"}, "no layer 'nowhere'"),
        ("relu", {"target": "os.system"}, "not a function"),
        ("view", {"target": "__class__"}, "not a tensor method"),
        ("mix", {"target": "absent"}, "no layer 'absent'"),
        ("mix", {"args": [{"node": "output"}]}, "not an earlier node"),
        ("mix", {"name": "x; import os"}, "not a usable name"),
        ("mix", {"op": "exec"}, "not an operation"),
        ("mix", {"kwargs": {"a b": 1}}, "no usable name"),
        ("cat", {"args": [{"set": [1]}]}, "not an argument"),
        ("x", {"target": "x, y=print(1)"}, "no usable name"),
    ],
)
def test_build_checks_everything(where: str, values: dict, words: str) -> None:
    description = json.loads(json.dumps(describe(net())))
    with pytest.raises(ArtifactError, match=words):
        build(edit(description, where, **values))


def test_huge_layers_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a")
    text = (path / "architecture.json").read_text()
    (path / "architecture.json").write_text(text.replace('"in_features": 4', '"in_features": 16000000'))
    with pytest.raises(ArtifactError, match="has shape"):
        load(path)


def test_batch_norms_fold_exactly() -> None:
    for model in (flat(), net()):
        model = model.double().eval()
        folded = fold_batch_norms(model)
        x = torch.randn(2, 3, 12, 12, dtype=torch.float64) * 4
        assert torch.allclose(folded(x), model(x), rtol=1e-12, atol=1e-12)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_a_batch_norm_whose_input_is_read_elsewhere_stays() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.bn(y)

    model = randomise(Two()).double().eval()
    folded = fold_batch_norms(model)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert torch.allclose(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_onnx_equals_pytorch_for_any_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import onnx
    import onnxruntime

    model = net().eval()
    error = export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    assert error < 1e-5
    assert capfd.readouterr() == ("", "")
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(tmp_path / "m.onnx").graph.node)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 8, 8)
    assert torch.allclose(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model(x), atol=1e-4)
    target = save(model, tmp_path / "a", example_inputs=x)
    assert (target / "model.onnx").exists()


def test_an_export_that_differs_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotEquivalent, match="limit"):
        export_onnx(net(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_not_finite_are_no_equality(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
    model[0].weight.data.fill_(float("inf"))
    with pytest.raises(NotEquivalent, match="not finite"):
        export_onnx(model, torch.randn(2, 3, 2, 2), tmp_path / "m.onnx")


def test_onnx_may_differ_by_what_float32_does_to_the_network_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that takes a small difference of large numbers: its own float32 rounding is beyond the fixed limit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 1, 1)).eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        model[0].bias.fill_(1e5)
        model[3].weight[:, ::2], model[3].weight[:, 1::2] = 1.0, -1.0
        model[2].weight[1::2], model[2].bias[1::2] = model[2].weight[::2] * (1 + 1e-6), model[2].bias[::2]
    own = rounding(model, x)
    assert own > 1e-4
    monkeypatch.setattr(onnx_export, "_onnx_error", lambda *_: 3 * own)
    export_onnx(model, x, tmp_path / "model.onnx")
    monkeypatch.setattr(onnx_export, "_onnx_error", lambda *_: 5 * own)
    with pytest.raises(NotEquivalent, match="differs"):
        export_onnx(model, x, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


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
