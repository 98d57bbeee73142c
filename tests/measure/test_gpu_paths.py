"""What only a GPU runs, with stand-ins for the device: no GPU has run any of it in these tests."""

import contextlib
import gc
import importlib
import json
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import pytest
import torch
from fake_device import pretended_gpu
from forked_workers import Forked
from torch import Tensor, nn

from rmprune.config import AmcConfig, MeasureConfig, PruneConfig, SearchConfig, SlimConfig
from rmprune.errors import ArtifactError, ConfigError
from rmprune.graph.tf32 import tf32
from rmprune.measure import BACKENDS, LatencyModel, check_available, measure_latencies, torch_backends
from rmprune.measure.backends import GPU_ONLY, Backend, prepare, surroundings
from rmprune.measure.candidate import Candidate, Prepared, Setting
from rmprune.pipelines.measure_files import FILE_BACKENDS

NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
X = torch.randn(1, 3, 8, 8)


def test_every_path_is_listed_and_refused_without_a_gpu() -> None:
    assert {"eager-tf32", "eager-float16", "cudagraph", "tensorrt", "tensorrt-float16"} <= set(GPU_ONLY)
    for name in GPU_ONLY:
        with pytest.raises(ConfigError, match=rf"'{name}' measures on the GPU \(device cuda\) only, not on cpu"):
            check_available([name], "cpu")


def test_tf32_is_as_the_name_says_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = flags()
    for name, allowed in (("eager", False), ("eager-tf32", True), ("cudagraph-tf32", True), ("eager-bfloat16", False)):
        with surroundings(name, "cuda"):
            assert flags() == (allowed, allowed)
        assert flags() == before
    with pytest.raises(ZeroDivisionError), surroundings("eager-tf32", "cuda"):
        raise ZeroDivisionError
    assert flags() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9")
def test_tf32_of_programs_that_set_it_the_newer_way(tmp_path: Path) -> None:
    """torch then refuses to let the older flags be read; in a process of its own, since that lasts."""

    def flags() -> list[str]:
        return [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]

    def found() -> list[list[str]]:
        """Before, and within and after each."""
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        said = [flags()]
        for allowed, device in ((False, "cuda:0"), (True, "cuda:0"), (False, "cpu")):
            with tf32(allowed, device):
                said.append(flags())
            said.append(flags())
        return said

    forked = Forked(tmp_path / "said.json", found)
    while not forked.done():
        time.sleep(0.01)
    before, without, after, within, *others = forked.result()
    assert before[1] == "tf32" and without == ["ieee"] * 2 and within == ["tf32"] * 2
    assert all(now == before for now in (after, *others))


def test_a_cuda_graph_is_recorded_after_a_warm_up_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    out, x = torch.zeros(1, 2), torch.ones(1, 2)

    class Doubled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            done.append("run")
            return out.copy_(2 * images)

    class Graph:
        def replay(self) -> None:
            done.append("replay")
            out.copy_(2 * x)

    @contextlib.contextmanager
    def recording(graph: Graph, stream: object, capture_error_mode: str) -> Iterator[None]:
        done.append("record")
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def on_device(*args: object) -> tuple[nn.Module, Tensor]:
        models.add(model := Doubled())
        return model, x

    monkeypatch.setattr(torch_backends, "_on_device", on_device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    prepared = torch_backends.cuda_graph(Candidate("net", NET, X), Setting("cuda", 1, 1))
    assert done == ["run"] * 3 + ["record", "run"]
    prepared()
    assert done[5:] == ["replay"] and torch.equal(prepared.outputs(torch.full((1, 2), 5.0)), torch.full((1, 2), 10.0))
    gc.collect()
    assert len(models) == 1  # its weights lie where the graph reads them


@pytest.mark.parametrize(
    ("backend", "float16"), [("onnxruntime", None), ("tensorrt", False), ("tensorrt-float16", True)]
)
def test_onnx_runtime_is_given_its_providers_and_inputs_that_stay_on_the_device(
    backend: str, float16: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = importlib.import_module("onnxruntime")
    asked: list[Any] = []
    bound: list[Any] = []

    class Session:
        def __init__(self, content: bytes, options: object, providers: list[Any]) -> None:
            asked.extend(providers)

        def get_providers(self) -> list[str]:
            return [name for name, _ in asked]

        def io_binding(self) -> Any:
            return SimpleNamespace(
                bind_ortvalue_input=lambda *args: bound.append(args), bind_output=lambda *args: bound.append(args)
            )

        def run_with_iobinding(self, binding: object) -> str:
            return "ran"

    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", lambda array, kind, index: (kind, index))
    monkeypatch.setattr(torch.cuda, "device", lambda name: contextlib.nullcontext())
    assert prepare(Candidate("net", NET, X), backend, "cuda:1", 1, 2)() == "ran"
    cuda = ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 0})
    first = [] if float16 is None else [("TensorrtExecutionProvider", {"device_id": 1, "trt_fp16_enable": float16})]
    assert asked == [*first, cuda] and bound == [("input", ("cuda", 1)), ("output", "cuda", 1)]


def test_a_provider_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = importlib.import_module("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kwargs: session)
    with pytest.raises(ConfigError, match="CUDAExecutionProvider is installed and does not load"):
        prepare(Candidate("net", NET, X), "onnxruntime", "cuda", 1, 1)
    with pytest.raises(ConfigError, match="no TensorrtExecutionProvider; pip install onnxruntime-gpu"):
        prepare(Candidate("net", NET, X), "tensorrt", "cuda", 1, 1)


@pytest.mark.parametrize("backend", ["tensorrt-engine", "tensorrt-engine-float16"])
def test_tensorrt_itself_runs_an_engine_of_the_batch_on_what_torch_holds(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the calls of TensorRT's own Python bindings, which computes on the CPU at the addresses that it is given."""
    x, candidate = torch.randn(2, 3, 8, 8), Candidate("net", NET, X)
    with pretended_gpu():
        if importlib.util.find_spec("tensorrt") is None:
            with pytest.raises(ConfigError, match=f"'{backend}' is not installed; pip install tensorrt"):
                prepare(candidate, backend, "cuda", 1, 2)
        monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
        with torch.inference_mode(), surroundings(backend, "cuda"):
            prepared = prepare(candidate, backend, "cuda", 1, 2)
            prepared()
            error = float((prepared.outputs(x) - NET(x)).abs().max() / NET(x).abs().max())
        assert error < 1e-6 if backend == "tensorrt-engine" else 1e-5 < error < 0.01
        with (
            pytest.raises(ConfigError, match=r"'cannot be built' .*TensorRT cannot build an engine"),
            torch.inference_mode(),
        ):
            monkeypatch.setattr(fake_tensorrt.Builder, "build_serialized_network", lambda *args: None)
            prepare(Candidate("cannot be built", NET, X), backend, "cuda", 1, 2)
    assert backend in FILE_BACKENDS or backend.endswith("float16")  # a file's types are its own


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which a run of 'eager' takes 3 ms, and the memory that torch says it took."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = 3.0 * runs[0]

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    runs = [0]

    def load(candidate: Candidate, setting: Setting) -> Prepared:
        assert setting.device == "cuda"

        def run() -> None:
            runs[0] += 1

        return Prepared(run, lambda images: images)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stand-in")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12 * 2**20)
    monkeypatch.setitem(BACKENDS, "eager", Backend(load))


@pytest.mark.usefixtures("gpu")
def test_times_are_the_device_s_and_memory_is_above_what_was_held() -> None:
    found = measure_latencies(
        {"net": NET}, X, backends=["eager"], threads=[1], batch_sizes=[6], device="cuda", seconds=0.0, min_rounds=4
    )["net"][0]
    assert found.device == "cuda" and found.median_ms == 3.0 and found.images_per_second == 2000
    assert found.peak_mib == 7.0 and found.to_dict()["peak_mib"] == 7.0


@pytest.mark.usefixtures("gpu")
def test_a_table_of_layer_times_is_measured_on_the_device_and_names_it(tmp_path: Path) -> None:
    table = LatencyModel("eager", threads=1, device="cuda", cache=tmp_path / "times.json", seconds=0.0, min_rounds=3)
    assert table.predict(NET, X) == 3.0 and table.block == 8  # one layer, whose time holds the runtime's own
    assert json.loads((tmp_path / "times.json").read_text())["gpu"] == "a stand-in"
    with pytest.raises(ArtifactError, match="gpu"):
        LatencyModel("eager", threads=1, cache=tmp_path / "times.json")


def test_budgets_in_time_may_be_counted_on_a_gpu() -> None:
    measure = MeasureConfig(device="cuda")
    assert SlimConfig(measure=measure, prune=PruneConfig(latency_ratio=(0.5,), cost="time")).measure.device == "cuda"
    assert AmcConfig(measure=measure, search=SearchConfig(constraint="latency")).measure.device == "cuda"


def test_graphs_are_timed_and_layers_tabled_where_the_network_goes(tmp_path: Path) -> None:
    """On a GPU that is not there: recorded, replayed, timed by events, and the outputs of replays are the network's."""
    with pretended_gpu():
        settings = {"threads": [1], "batch_sizes": [2], "device": "cuda", "seconds": 0.0, "min_rounds": 3}
        times = measure_latencies(
            {"net": NET, "twin": NET}, X, backends=["cudagraph", "eager-tf32"], reference="net", **settings
        )
        found = [(t.backend, t.number_format, t.peak_mib) for t in times["twin"]]
        assert found == [("cudagraph", "float32", 1.0), ("eager-tf32", "tf32", 1.0)]
        assert all(t.device == "cuda" and t.ratio is not None and t.median_ms > 0 for t in times["twin"])
        with torch.inference_mode(), surroundings("cudagraph", "cuda"):
            prepared = prepare(Candidate("net", NET, X), "cudagraph", "cuda", 1, 2)
            for x in (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)):
                assert torch.allclose(prepared.outputs(x), NET(x), atol=1e-6)
        table = LatencyModel(
            "cudagraph", threads=1, device="cuda", cache=tmp_path / "times.json", seconds=0.0, min_rounds=3
        )
        assert (
            table.predict(NET, X) > 0 and json.loads((tmp_path / "times.json").read_text())["gpu"] == "a pretended GPU"
        )


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # what torch.compile itself calls
@pytest.mark.parametrize("backend", [name for name, entry in BACKENDS.items() if "cuda" in entry.devices])
def test_on_a_gpu_every_backend_computes_the_network(backend: str) -> None:
    try:
        check_available([backend], "cuda")
    except ConfigError as reason:
        pytest.skip(str(reason))
    candidate, x = Candidate("net", NET, X), torch.randn(2, 3, 8, 8)
    with surroundings(backend, "cuda"), torch.inference_mode():
        prepared = prepare(candidate, backend, "cuda", 1, 2)
        prepared()
        assert torch.allclose(
            prepared.outputs(x), NET(x), atol=1e-5 if "float32" in BACKENDS[backend].number_format else 0.05
        )
