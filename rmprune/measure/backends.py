"""How each runtime executes a network: one function for each, from a folded network and an input to a callable. No
timing here.

Packages are imported when their backend is asked for; `check_backend` names the pip command where one is missing.
"""

import contextlib
import copy
import importlib.util
import warnings
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from rmprune.artifact.onnx import onnx_bytes
from rmprune.errors import ConfigError, RmpruneError
from rmprune.graph.fold import fold_batch_norms
from rmprune.graph.trace import trace

Run = Callable[[], object]
PACKAGES = ("onnxruntime", "openvino")  # backends that are packages of the same name


class Candidate:
    """A network made ready for measuring: eval mode, float32, batch norms folded; its ONNX form is made once, when
    asked for.
    """

    def __init__(self, name: str, model: nn.Module, example_inputs: Tensor) -> None:
        self.name = name
        self.example_inputs = example_inputs.detach().float().cpu()[:1]
        self.folded = fold_batch_norms(model).float().cpu()

    @cached_property
    def onnx(self) -> bytes:
        plain = copy.deepcopy(self.folded).cpu().to(memory_format=torch.contiguous_format)
        return onnx_bytes(plain, self.example_inputs)

    def inputs(self, batch_size: int) -> Tensor:
        """The first example, `batch_size` times: (batch_size, C, H, W), float32."""
        return self.example_inputs.repeat(batch_size, *[1] * (self.example_inputs.dim() - 1))


def _torch_module(candidate: Candidate, batch_size: int, device: str) -> tuple[nn.Module, Tensor]:
    """Network and input on `device`, in channels-last order where there is such an order."""
    x = candidate.inputs(batch_size).to(device)
    model = candidate.folded.to(device)
    if x.dim() == 4:
        return model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return model, x


def eager(candidate: Candidate, device: str, threads: int, batch_size: int) -> Run:
    """PyTorch as it is, channels-last. Threads are torch's own, set by the caller."""
    model, x = _torch_module(candidate, batch_size, device)
    return lambda: model(x)


def torchscript(candidate: Candidate, device: str, threads: int, batch_size: int) -> Run:
    """A frozen torch.jit trace, channels-last."""
    model, x = _torch_module(candidate, batch_size, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript announces its own end
        traced = torch.jit.freeze(torch.jit.trace(model, x, check_trace=False))
        for _ in range(3):  # its profiling runs
            traced(x)

    def run() -> object:
        return traced(x)

    return run


def compiled(candidate: Candidate, device: str, threads: int, batch_size: int) -> Run:
    """torch.compile with its defaults, channels-last; on a CPU it needs a C++ compiler."""
    model, x = _torch_module(candidate, batch_size, device)
    # A forward function of its own: candidates that share one would pay for each other's guards and recompilations.
    function = torch.compile(fx.GraphModule(model, trace(model)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(x)
    except Exception as error:  # whatever the compiler chain raises
        raise ConfigError(
            f"backend 'compile': torch.compile fails here ({str(error).strip().splitlines()[0][:150]}); install a C++ "
            "compiler (apt install g++), or measure with another backend"
        ) from error
    return lambda: function(x)


def onnx_runtime(candidate: Candidate, device: str, threads: int, batch_size: int) -> Run:
    """ONNX Runtime, its own threads, static batch size.

    Its threads spin while a run lasts, as they do by default, and stop when it ends (force_spinning_stop): left to spin
    on, they would take the cores from the candidate measured next.
    """
    onnxruntime = importlib.import_module("onnxruntime")
    gpu = ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)})
    provider = gpu if device.startswith("cuda") else "CPUExecutionProvider"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_free_dimension_override_by_name("batch", batch_size)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(candidate.onnx, options, providers=[provider])
    feed = {"input": candidate.inputs(batch_size).numpy()}
    return lambda: session.run(None, feed)


def openvino(candidate: Candidate, device: str, threads: int, batch_size: int) -> Run:
    """OpenVINO on the CPU, latency hint, one stream, static batch size, float32 (it would take bfloat16 by itself)."""
    ov = importlib.import_module("openvino")
    core = ov.Core()
    network = core.read_model(candidate.onnx)
    x = candidate.inputs(batch_size).numpy()
    network.reshape(list(x.shape))
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x))
    return lambda: request.infer()


BACKENDS: dict[str, Callable[[Candidate, str, int, int], Run]] = {
    "eager": eager,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
    "torchscript": torchscript,
    "compile": compiled,
}


def check_backend(backend: str, device: str) -> None:
    """ConfigError where a backend is unknown, not installed, or cannot run on this device."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; there are {', '.join(BACKENDS)}")
    if backend in PACKAGES and importlib.util.find_spec(backend) is None:
        raise ConfigError(f"backend {backend!r} is not installed; pip install {backend}")
    if device == "cpu":
        return
    if backend == "openvino":
        raise ConfigError(f"backend 'openvino' measures on the CPU only, not on {device}; leave it out")
    if backend == "onnxruntime":
        onnxruntime = importlib.import_module(backend)
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ConfigError(
                f"backend 'onnxruntime' cannot use {device} here; pip install onnxruntime-gpu, or use eager"
            )


def current(device: str) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU (cuda, cuda:N) the one that streams, events and synchronisation are of; nothing for the CPU."""
    return torch.cuda.device(device) if device.startswith("cuda:") else contextlib.nullcontext()


def prepare(candidate: Candidate, backend: str, device: str, threads: int, batch_size: int) -> Run:
    """A callable that runs `candidate` once; ConfigError where the backend does not exist here or cannot take the
    network.
    """
    check_backend(backend, device)
    try:
        with current(device):
            return BACKENDS[backend](candidate, device, threads, batch_size)
    except RmpruneError:
        raise
    except Exception as error:  # each runtime has its own errors
        raise ConfigError(
            f"backend {backend!r} cannot run {candidate.name!r} ({type(error).__name__}: {str(error)[:200]}); "
            "measure with another backend"
        ) from error
