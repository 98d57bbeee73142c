"""Every backend computes the network it was given, and accuracy is measured in each number format."""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from marks import few
from torch import nn

import rmprune
from rmprune.config import DataConfig
from rmprune.data.load import Dataset, load_dataset
from rmprune.errors import ConfigError
from rmprune.measure import (
    BACKENDS,
    backend_accuracy,
    calibration_images,
    check_available,
    measure_latencies,
)
from rmprune.measure.backends import prepare, surroundings
from rmprune.measure.candidate import Candidate
from rmprune.measure.quantise import onnx_int8
from rmprune.training import evaluate

ERROR = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.15}  # largest, of the largest output
CPU = [name for name, backend in BACKENDS.items() if "cpu" in backend.devices and not name.startswith("compile")]


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for cin, cout, stride in ((1, 16, 1), (16, 24, 2), (24, 32, 1)):
        layers += [nn.Conv2d(cin, cout, 3, stride, 1), nn.BatchNorm2d(cout), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig())


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> nn.Module:
    net, (x, y) = small_net(), next(digits.train.batches(1200))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        chosen = torch.randint(len(x), (128,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return net.eval()


def skip_unless_here(backend: str) -> None:
    try:
        check_available([backend], "cpu")
    except ConfigError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("batch_size", few([1, 3], 3))
def test_every_backend_computes_the_network_for_the_images_given(
    backend: str, batch_size: int, trained: nn.Module, digits: Dataset
) -> None:
    skip_unless_here(backend)
    candidate = Candidate("net", trained, digits.test.example(1), calibration_images(digits.train))
    x = digits.test.example(8)[-batch_size:]
    with surroundings(backend, "cpu"), torch.inference_mode():
        prepared = prepare(candidate, backend, "cpu", 1, batch_size)
        prepared()
        actual, expected = prepared.outputs(x), trained(x)
        prepared()  # its own input is in place again
    assert actual.dtype == torch.float32 and actual.shape == expected.shape and prepared.load_ms > 0
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= ERROR[BACKENDS[backend].number_format]
    assert BACKENDS[backend].number_format == "float32" or error > 1e-4  # it is that format


def test_accuracy_is_that_of_the_number_format(trained: nn.Module, digits: Dataset) -> None:
    networks, found = {"net": trained, "wide range": with_wide_channel(trained)}, {}
    for name, net in networks.items():
        found[name] = {
            backend: backend_accuracy(
                net, digits.test, backend, calibration=calibration_images(digits.train), threads=1
            )
            for backend in ("eager", "onnxruntime-int8")
        }
    exact = evaluate(trained, digits.test).accuracy
    assert exact > 0.9 and found["net"]["eager"] == found["wide range"]["eager"] == pytest.approx(exact, abs=1e-9)
    assert abs(found["net"]["onnxruntime-int8"] - exact) < 0.03
    assert found["wide range"]["onnxruntime-int8"] < exact - 0.2  # 255 steps over values 20,000 times as large


def with_wide_channel(net: nn.Module) -> nn.Module:
    """The same function in float32, with one more channel of large values in the first layer that nothing reads."""
    first, norm, second = net[0], net[1], net[3]  # type: ignore[index]
    wide = nn.Conv2d(1, 17, 3, 1, 1)
    wider_norm, reader = nn.BatchNorm2d(17), nn.Conv2d(17, 24, 3, 2, 1)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([first.weight, torch.full((1, 1, 3, 3), 20_000.0)]))
        wide.bias.copy_(torch.cat([first.bias, torch.zeros(1)]))
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            getattr(wider_norm, name).copy_(torch.cat([getattr(norm, name), torch.tensor([value])]))
        reader.weight.copy_(torch.cat([second.weight, torch.zeros(24, 1, 3, 3)], 1))
        reader.bias.copy_(second.bias)
    return nn.Sequential(wide, wider_norm, net[2], reader, *list(net)[4:]).eval()  # type: ignore[index,call-overload]


@pytest.mark.parametrize("residual", [True, False])
def test_int8_takes_a_residual_network_whole_and_so_compares_fairly(residual: bool, tmp_path: Path) -> None:
    net, x = rmprune.models.create("resnet8", num_classes=4, width=4).eval(), torch.randn(16, 3, 16, 16)
    net = net if residual else rmprune.remove_residuals(net, x).model
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(onnx_int8(Candidate("net", net, x, x)), options, providers=["CPUExecutionProvider"])
    kernels = {node.op_type for node in importlib.import_module("onnx").load(tmp_path / "optimised.onnx").graph.node}
    assert "QLinearConv" in kernels and ("QLinearAdd" in kernels) == residual
    assert not kernels & {"Conv", "FusedConv", "Add", "Relu", "Gemm"}


@pytest.mark.parametrize("backend", ["onnxruntime-int8", "openvino-int8"])
def test_ranges_hold_the_greatest_value_seen(backend: str) -> None:
    skip_unless_here(backend)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[5] *= 20  # one bright image: a mean of extremes would clip it
    with torch.inference_mode():
        found = prepare(Candidate("net", net, x, x), backend, "cpu", 1, 1).outputs(x[5:6])
        expected = net(x[5:6])
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.05


def test_int8_without_training_images_is_refused_by_name(trained: nn.Module, digits: Dataset) -> None:
    for calibration in (None, torch.empty(0, 1, 8, 8)):
        with pytest.raises(ConfigError, match=r"int8 needs training images .* 'model'"):
            backend_accuracy(trained, digits.test, "onnxruntime-int8", calibration=calibration)
    with pytest.raises(ConfigError, match="int8 needs training images"):
        measure_latencies({"a": trained}, digits.test.example(1), backends=["onnxruntime-int8"], seconds=0.0)


def test_times_hold_the_accuracy_of_formats_below_float32(trained: nn.Module, digits: Dataset) -> None:
    found = measure_latencies(
        {"net": trained},
        digits.test.example(1),
        backends=["eager", "onnxruntime-int8"],
        threads=[1],
        batch_sizes=[1, 2],
        seconds=0.0,
        min_rounds=3,
        calibration=calibration_images(digits.train),
        split=digits.test,
    )["net"]
    assert [time.number_format for time in found] == ["float32"] * 2 + ["int8"] * 2
    assert "accuracy" not in found[0].to_dict() and found[2].to_dict()["accuracy"] == found[3].accuracy
    direct = backend_accuracy(trained, digits.test, "onnxruntime-int8", calibration=calibration_images(digits.train))
    assert found[2].accuracy == direct


def test_the_last_batch_counts_its_own_images_alone(digits: Dataset) -> None:
    layer = nn.Linear(64, 10)
    nn.init.zeros_(layer.weight)
    layer.bias.data = -torch.arange(10.0)
    always_0 = nn.Sequential(nn.Flatten(), layer)
    labels = torch.cat([y for _, y in digits.test.batches(100)])[:70]
    assert backend_accuracy(always_0, digits.test, "eager", batch_size=64, limit=70) == float(
        (labels == 0).double().mean()
    )
    with pytest.raises(ConfigError, match="no image"):
        backend_accuracy(always_0, digits.test, "eager", limit=0)


class Tens(list):
    """Somebody's own loader, whose batches have ten images whatever is asked for."""

    def batches(self, *_: object, **__: object) -> Iterator[tuple[torch.Tensor, None]]:
        return ((x, None) for x in self)

    def __len__(self) -> int:
        return 10 * super().__len__()


def test_calibration_images_are_training_images_of_all_classes(digits: Dataset) -> None:
    images = calibration_images(digits.train, 200)
    everything = next(digits.train.batches(len(digits.train)))[0]
    assert images.shape == (200, 1, 8, 8) and torch.equal(images, calibration_images(digits.train, 200))
    known = {image.numpy().tobytes() for image in everything}
    assert all(image.numpy().tobytes() in known for image in images)
    assert len(calibration_images(digits.train, 10**6)) == len(digits.train)
    assert torch.equal(calibration_images(Tens([images[:10]] * 9), 25), torch.cat([images[:10]] * 3)[:25])  # type: ignore[arg-type]


def test_a_processor_without_bfloat16_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmprune.measure.backends.has_instruction", lambda *names: False)
    with pytest.raises(ConfigError, match=r"'eager-bfloat16': this processor has no bfloat16 .*avx512_bf16"):
        check_available(["eager-bfloat16"], "cpu")


@pytest.mark.parametrize(
    ("backend", "missing", "command"),
    [
        ("ncnn", "pnnx", "pip install pnnx"),
        ("openvino-int8", "nncf", "pip install nncf"),
        ("onnxruntime-int8", "onnxruntime", "pip install onnxruntime"),
    ],
)
def test_an_absent_package_is_named_with_its_command(
    backend: str, missing: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else object())
    with pytest.raises(ConfigError, match=rf"'{backend}' is not installed; {command}$"):
        check_available([backend], "cpu")


def test_a_provider_that_a_build_lacks_is_named() -> None:
    if "DnnlExecutionProvider" in importlib.import_module("onnxruntime").get_available_providers():
        pytest.skip("this build has it")
    with pytest.raises(
        ConfigError, match="'onnxruntime-dnnl' cannot use cpu here, onnxruntime has no DnnlExecutionProvider"
    ):
        check_available(["onnxruntime-dnnl"], "cpu")


def test_networks_are_left_alone_and_forms_made_once(trained: nn.Module, digits: Dataset) -> None:
    made: list[str] = []

    def form(candidate: Candidate) -> str:
        made.append(candidate.name)
        return candidate.name

    before = {name: value.clone() for name, value in trained.state_dict().items()}
    candidate = Candidate("net", trained, digits.test.example(1))
    assert candidate.form(form) == candidate.form(form) == "net" and made == ["net"]
    for backend in ("eager-bfloat16", "eager"):
        skip_unless_here(backend)
        with torch.inference_mode():
            prepare(candidate, backend, "cpu", 1, 1)()
    assert all(p.dtype == torch.float32 for p in candidate.folded.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
