"""Latency: every backend runs, candidates take turns, settings are put back, and a larger network takes longer."""

import contextlib
import gc
import importlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rmprune.errors import ConfigError
from rmprune.measure import backends, check_available, measure_latencies, measure_latency, rounds
from rmprune.measure.backends import prepare
from rmprune.measure.candidate import Candidate
from rmprune.measure.rounds import timed_rounds


def net(width: int, depth: int = 2) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)).eval()


X = torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "openvino", "torchscript"])
def test_every_backend_computes_the_network(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = net(8)
    with torch.inference_mode():
        result = prepare(Candidate("m", model, X), backend, "cpu", 1, 3)()
    if backend == "openvino":
        result = next(iter(result.values()))
    actual = torch.as_tensor(result[0] if isinstance(result, list) else result)
    assert torch.allclose(actual, model(X[:1]).expand(3, -1), atol=1e-5)


class Viewed(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x).view(x.size(0), -1))


@pytest.mark.parametrize("backend", ["eager", "torchscript"])
def test_code_that_views_maps_as_they_lie_is_measured(backend: str) -> None:
    model = Viewed(nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, 5)).eval()
    with torch.inference_mode():
        result = prepare(Candidate("m", model, X), backend, "cpu", 1, 2)()
    assert torch.allclose(result, model(X[:1]).expand(2, -1), atol=1e-5)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_times_of_every_configuration(two_threads: None) -> None:
    models = {"small": net(4), "large": net(48, depth=6)}
    state = {k: v.clone() for k, v in models["small"].state_dict().items()}
    told: list[str] = []
    results = measure_latencies(
        models,
        X,
        backends=["eager", "onnxruntime"],
        threads=[1],
        batch_sizes=[1, 4],
        seconds=0.0,
        min_rounds=5,
        reference="small",
        progress=told.append,
    )
    assert told[0] == "eager, 1 thread, batch 1" and len(told) == 4
    assert [(r.backend, r.batch_size) for r in results["small"]] == [
        ("eager", 1),
        ("eager", 4),
        ("onnxruntime", 1),
        ("onnxruntime", 4),
    ]
    for small, large in zip(results["small"], results["large"], strict=True):
        assert small.q1_ms <= small.median_ms <= small.q3_ms
        assert large.median_ms > small.median_ms
        assert small.ratio == 1.0 and large.ratio is not None and large.ratio > 1.5
        assert large.rounds >= 5 and large.runs >= large.rounds
        assert {"backend", "device", "threads", "batch_size", "median_ms", "q1_ms", "q3_ms"} <= set(large.to_dict())
    assert torch.get_num_threads() == 2 and gc.isenabled()
    assert all(torch.equal(v, state[k]) for k, v in models["small"].state_dict().items())


def test_candidates_take_turns_in_a_new_order_each_round() -> None:
    import random

    calls: list[str] = []

    def run(name: str):
        def once() -> None:
            calls.append(name)
            for _ in range(200_000):
                pass

        return once

    turns, repeats, _ = timed_rounds({n: run(n) for n in "abc"}, "cpu", 0.0, 12, random.Random(0))
    assert all(len(times) == 12 for times in turns.values())
    rounds = calls[-sum(2 * repeats[n] * 12 for n in "abc") :]
    orders = []
    while rounds:
        order = []
        for _ in range(3):
            name = rounds[0]
            order.append(name)
            assert rounds[: 2 * repeats[name]] == [name] * (2 * repeats[name])
            rounds = rounds[2 * repeats[name] :]
        orders.append("".join(order))
    assert all(sorted(o) == ["a", "b", "c"] for o in orders) and len(set(orders)) > 1


def test_one_network() -> None:
    latency = measure_latency(net(4), X, threads=1, seconds=0.0, min_rounds=3)
    assert latency.backend == "onnxruntime" and latency.batch_size == 2 and latency.ratio is None
    assert "ratio" not in latency.to_dict()


@pytest.mark.parametrize("backend", ["eager", "torchscript", "onnxruntime"])
def test_inputs_of_whole_numbers_stay_whole(backend: str) -> None:
    words = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)).eval()
    assert measure_latency(words, torch.tensor([[1, 2, 4]]), backend=backend, threads=1, seconds=0.0, min_rounds=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backends": ["tvm"]}, "there are eager"),
        ({"reference": "other"}, "not among"),
        ({"threads": [0]}, "at least 1"),
        ({"seconds": "2"}, "seconds is '2'; give float"),
        ({"device": "tpu"}, "use cpu or cuda"),
    ],
)
def test_bad_settings_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        measure_latencies({"m": net(4)}, X, **arguments)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "openvino" else real(name, *more)
    )
    with pytest.raises(ConfigError, match="pip install openvino"):
        measure_latencies({"m": net(4)}, X, backends=["openvino"])


def test_what_does_not_run_on_a_device_is_refused_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="'openvino' measures on the CPU only"):
        check_available(("eager", "openvino"), "cuda")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ConfigError, match="pip install onnxruntime-gpu"):
        check_available(("onnxruntime",), "cuda:0")
    check_available(("eager", "torchscript"), "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        measure_latencies({"m": net(4)}, X, device="cuda")


def test_a_second_gpu_is_the_current_one_while_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU here: streams, events and ONNX Runtime's device are those of the GPU that was named."""
    current = ["cuda:0"]

    @contextlib.contextmanager
    def device(name: str) -> Iterator[None]:
        current.append(name)
        yield
        current.pop()

    def timer(run: Callable[[], object], repeats: int) -> float:
        assert current[-1] == "cuda:1"
        return 1.0

    providers: list[object] = []

    def session(content: bytes, options: object, providers: list[object]) -> object:
        assert current[-1] == "cuda:1"
        found.extend(providers)
        bound = SimpleNamespace(bind_ortvalue_input=lambda *args: None, bind_output=lambda *args: None)
        return SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"], io_binding=lambda: bound)

    found = providers
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(rounds, "_cuda_ms", timer)
    monkeypatch.setattr(backends, "check_backend", lambda backend, device: None)
    turns, *_ = timed_rounds({"a": lambda: None}, "cuda:1", 0.0, 3, random.Random(0), warmup=0.0)
    assert turns == {"a": [1.0] * 3} and current == ["cuda:0"]
    monkeypatch.setattr(importlib.import_module("onnxruntime"), "InferenceSession", session)
    monkeypatch.setattr("onnxruntime.OrtValue.ortvalue_from_numpy", lambda array, kind, index: (kind, index))
    prepare(Candidate("m", net(4), X), "onnxruntime", "cuda:1", 1, 1)
    assert providers == [("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 0})]
