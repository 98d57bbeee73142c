"""Every backend by name: what it needs, in which number format it computes, where it runs. The adapters lie in torch_backends,
runtimes and quantise; no timing here.

To add one: a function from (Candidate, Setting) to Prepared, and a line in BACKENDS.
"""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rmprune.errors import ConfigError, RmpruneError, out_of_memory
from rmprune.graph.tf32 import tf32
from rmprune.measure.candidate import Candidate, Prepared, Setting, folded_form, onnx_form
from rmprune.measure.machine import BFLOAT16, has_instruction
from rmprune.measure.quantise import onnx_int8, openvino_int8
from rmprune.measure.runtimes import (
    Provider,
    cpu_or_cuda,
    float16_form,
    missing_provider,
    ncnn,
    ncnn_form,
    onnx_runtime,
    openvino,
    openvino_form,
    tensorrt,
    tensorrt_engine,
)
from rmprune.measure.torch_backends import compiled, cuda_graph, current, eager, torchscript
from rmprune.onnx.compare import runtime_says
from rmprune.onnx.file import is_onnx

__all__ = [
    "BACKENDS", "Backend", "check_backend", "current", "needs_calibration", "prepare",
    "surroundings",
]  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """`form` is what would be deployed, made before any clock starts; `load` brings it into the runtime."""

    load: Callable[[Candidate, Setting], Prepared]
    form: Callable[[Candidate], Any] = folded_form
    number_format: str = "float32"
    """float32, tf32, bfloat16, float16 or int8."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    packages: tuple[str, ...] = ()
    """Modules that have to be there; pip knows them by the same names."""
    providers: Callable[[str], list[Provider]] | None = None
    """ONNX Runtime's, for those that are its."""


def _torch(load: Callable[..., Prepared], number_format: str, *devices: str, **options: Any) -> Backend:
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(number_format)
    options |= {} if dtype is None else {"dtype": dtype}
    return Backend(partial(load, **options), number_format=number_format, devices=devices)


def _onnx(providers: Callable[[str], list[Provider]], *devices: str, number_format: str = "float32") -> Backend:
    form = onnx_int8 if number_format == "int8" else onnx_form
    load = partial(onnx_runtime, form=form, providers=providers)
    return Backend(load, form, number_format, devices, ("onnxruntime",), providers)


BACKENDS: dict[str, Backend] = {
    "eager": _torch(eager, "float32", "cpu", "cuda"),
    "onnxruntime": _onnx(cpu_or_cuda, "cpu", "cuda"),
    "openvino": Backend(openvino, openvino_form, "float32", ("cpu",), ("openvino",)),
    "torchscript": _torch(torchscript, "float32", "cpu", "cuda"),
    "compile": _torch(compiled, "float32", "cpu", "cuda"),
    "ncnn": Backend(ncnn, ncnn_form, "float32", ("cpu",), ("ncnn", "pnnx")),
    "onnxruntime-int8": _onnx(cpu_or_cuda, "cpu", number_format="int8"),
    "openvino-int8": Backend(
        partial(openvino, form=openvino_int8), openvino_int8, "int8", ("cpu",), ("openvino", "nncf")
    ),
    "eager-contiguous": _torch(eager, "float32", "cpu", "cuda", channels_last=False),
    "eager-bfloat16": _torch(eager, "bfloat16", "cpu", "cuda"),
    "compile-bfloat16": _torch(compiled, "bfloat16", "cpu", "cuda"),
    "openvino-bfloat16": Backend(
        partial(openvino, precision="bf16"), openvino_form, "bfloat16", ("cpu",), ("openvino",)
    ),
    "onnxruntime-dnnl": _onnx(lambda _: [("DnnlExecutionProvider", {})], "cpu"),  # oneDNN
    "onnxruntime-xnnpack": _onnx(lambda _: [("XnnpackExecutionProvider", {})], "cpu"),
    "eager-tf32": _torch(eager, "tf32", "cuda"),
    "eager-float16": _torch(eager, "float16", "cuda"),
    "compile-float16": _torch(compiled, "float16", "cuda"),
    "cudagraph": _torch(cuda_graph, "float32", "cuda"),
    "cudagraph-tf32": _torch(cuda_graph, "tf32", "cuda"),
    "cudagraph-bfloat16": _torch(cuda_graph, "bfloat16", "cuda"),
    "cudagraph-float16": _torch(cuda_graph, "float16", "cuda"),
    "tensorrt": _onnx(tensorrt, "cuda"),
    "tensorrt-float16": _onnx(partial(tensorrt, float16=True), "cuda", number_format="float16"),
    "tensorrt-engine": Backend(tensorrt_engine, onnx_form, "float32", ("cuda",), ("tensorrt",)),
    "tensorrt-engine-float16": Backend(
        partial(tensorrt_engine, form=float16_form), float16_form, "float16", ("cuda",), ("tensorrt",)
    ),
}

GPU_ONLY = tuple(name for name, backend in BACKENDS.items() if "cpu" not in backend.devices)
"""Backends that nothing but a GPU runs. Besides these a GPU alone runs: `rounds._cuda_ms` and `_gpu_peak_mib`, `torch_backends.cuda_graph`
and `tf32`, the bound inputs of `runtimes.onnx_runtime`, `runtimes.tensorrt` and `tensorrt_engine`. Tests stand in for the device; what ran
on one is in reports/gpu (TensorRT is not).
"""


def backend_named(backend: str) -> Backend:
    """The entry of BACKENDS; ConfigError where there is none, with the names of all."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; there are {', '.join(BACKENDS)}")
    return BACKENDS[backend]


def check_backend(backend: str, device: str) -> None:
    """ConfigError where a backend is unknown, not installed, or cannot run on this device; it says what to do."""
    entry = backend_named(backend)
    if device.partition(":")[0] not in entry.devices:
        only = "CPU" if entry.devices == ("cpu",) else "GPU (device cuda)"
        raise ConfigError(f"backend {backend!r} measures on the {only} only, not on {device}; leave it out")
    missing = [package for package in entry.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"backend {backend!r} is not installed; pip install {' '.join(missing)}")
    if device == "cpu" and entry.number_format == "bfloat16" and not has_instruction(*BFLOAT16):
        raise ConfigError(
            f"backend {backend!r}: this processor has no bfloat16 instructions ({', '.join(BFLOAT16)}), it would only be imitated; "
            "leave it out"
        )
    lacking = None if entry.providers is None else missing_provider(entry.providers, device)
    if lacking is not None:
        remedy = "pip install onnxruntime-gpu, or use eager" if device != "cpu" else f"install a build with {lacking}"
        raise ConfigError(f"backend {backend!r} cannot use {device} here, onnxruntime has no {lacking}; {remedy}")


def needs_calibration(backends: Sequence[str]) -> bool:
    """Whether one of these chooses ranges by training images."""
    return any(name in BACKENDS and BACKENDS[name].number_format == "int8" for name in backends)


def reduced(backends: Sequence[str]) -> list[str]:
    """Those whose number format may cost accuracy."""
    return [name for name in backends if name in BACKENDS and BACKENDS[name].number_format != "float32"]


@contextlib.contextmanager
def surroundings(backend: str, device: str) -> Any:
    """What has to hold from preparing to the last run: the current GPU, and TF32 as the number format says."""
    with current(device), tf32(BACKENDS[backend].number_format == "tf32", device):
        yield


def prepare(candidate: Candidate, backend: str, device: str, threads: int, batch_size: int) -> Prepared:
    """`candidate` in its runtime; ConfigError where the backend does not exist here or cannot take the network.

    Run it under `surroundings`.
    """
    check_backend(backend, device)
    entry = BACKENDS[backend]
    with says_what_fails(candidate.name, backend), surroundings(backend, device):
        candidate.form(entry.form)
        start = time.perf_counter()
        prepared = entry.load(candidate, Setting(device, threads, batch_size))
        return Prepared(prepared.run, prepared.outputs, (time.perf_counter() - start) * 1e3)


@contextlib.contextmanager
def says_what_fails(name: str, backend: str) -> Iterator[None]:
    """Whatever a runtime raises becomes a ConfigError that names the network and the backend."""
    try:
        yield
    except RmpruneError:
        raise
    except Exception as error:  # each runtime has its own errors
        other = "export it again, or measure with another backend" if is_onnx(name) else "measure with another backend"
        remedy = "take a smaller batch size" if out_of_memory(error) else other
        raise ConfigError(
            f"backend {backend!r} cannot run {name!r} ({type(error).__name__}: {runtime_says(error)}); {remedy}"
        ) from error
