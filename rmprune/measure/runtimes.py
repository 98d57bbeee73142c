"""Runtimes beside PyTorch: ONNX Runtime and its providers, TensorRT, OpenVINO, ncnn. Packages are imported when asked for."""

import contextlib
import importlib
import importlib.util
import io
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.copied import copied
from rmprune.measure.candidate import Candidate, Prepared, Setting, folded_form, onnx_form
from rmprune.measure.torch_backends import graphed
from rmprune.onnx.export import onnx_bytes

Provider = tuple[str, dict[str, Any]]


def cpu_or_cuda(device: str) -> list[Provider]:
    """ONNX Runtime's own CPU provider, or its CUDA one in true float32 (by itself it takes TF32)."""
    if device == "cpu":
        return [("CPUExecutionProvider", {})]
    return [("CUDAExecutionProvider", {"device_id": _index(device), "use_tf32": 0})]


def tensorrt(device: str, *, float16: bool = False) -> list[Provider]:
    """TensorRT in float32, or float16 where it likes; CUDA takes what it lacks."""
    return [
        ("TensorrtExecutionProvider", {"device_id": _index(device), "trt_fp16_enable": float16}),
        *cpu_or_cuda(device),
    ]


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def missing_provider(providers: Callable[[str], list[Provider]], device: str) -> str | None:
    """The first provider that this build of ONNX Runtime lacks."""
    present = importlib.import_module("onnxruntime").get_available_providers()
    return next((name for name, _ in providers(device) if name not in present), None)


def session_options(threads: int) -> Any:
    """ONNX Runtime's, as everything here is timed by it: its threads spin while a run lasts, as they do by default, and stop when it ends
    (force_spinning_stop): left to spin on, they would take the cores from the candidate measured next."""
    options = importlib.import_module("onnxruntime").SessionOptions()
    options.log_severity_level = 4  # what fails is raised as well
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def onnx_runtime(
    candidate: Candidate,
    setting: Setting,
    *,
    form: Callable[[Candidate], bytes | str] = onnx_form,
    providers: Callable[[str], list[Provider]] = cpu_or_cuda,
) -> Prepared:
    """ONNX Runtime, its own threads, static batch size; on a GPU input and output stay there, and each run waits for its end."""
    onnxruntime, options = importlib.import_module("onnxruntime"), session_options(setting.threads)
    for name, size in candidate.free_sizes(setting.batch_size).items():
        options.add_free_dimension_override_by_name(name, size)
    asked = providers(setting.device)
    session = onnxruntime.InferenceSession(candidate.form(form), options, providers=asked)
    if asked[0][0] not in session.get_providers():  # it goes on without one that does not load
        raise RuntimeError(f"{asked[0][0]} is installed and does not load")
    names = candidate.names
    feed = {name: x.numpy() for name, x in zip(names, candidate.batch(setting.batch_size), strict=True)}
    if len(names) > 1:  # one that nothing depends on is left out
        feed = {entry.name: feed[entry.name] for entry in session.get_inputs()}

    def outputs(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {names[0]: images.numpy()})[0])

    if setting.device == "cpu":
        return Prepared(lambda: session.run(None, feed), outputs)
    candidate.inputs(1)  # refuses several
    bound, index = session.io_binding(), _index(setting.device)
    bound.bind_ortvalue_input(names[0], onnxruntime.OrtValue.ortvalue_from_numpy(feed[names[0]], "cuda", index))
    for name in candidate.results:
        bound.bind_output(name, "cuda", index)
    return Prepared(lambda: session.run_with_iobinding(bound), outputs)


class _Half(nn.Module):
    """A network that computes in float16 between float32 inputs and outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copied(network).half()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x.half())
        return found.float()


def float16_form(candidate: Candidate) -> bytes:
    """ONNX that computes in float16, for runtimes that keep its types; inputs and outputs float32, batch size free."""
    return onnx_bytes(_Half(candidate.form(folded_form)).eval(), candidate.example_inputs)


def tensorrt_engine(
    candidate: Candidate, setting: Setting, *, form: Callable[[Candidate], bytes | str] = onnx_form
) -> Prepared:
    """TensorRT 10 or later by itself: an engine for this batch size, its number formats those of the ONNX form (strongly typed), without
    TF32; recorded as a CUDA graph, since it waits where it is given the default stream.

    Never run on a GPU. The calls are those of its Python bindings 10.0 and 11.4, whose signatures were looked at.
    """
    trt = importlib.import_module("tensorrt")
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser, given = trt.OnnxParser(network, log), candidate.form(form)
    if not (parser.parse_from_file(given) if isinstance(given, str) else parser.parse(given)):
        raise RuntimeError(f"TensorRT cannot read its ONNX form: {parser.get_error(0)}")
    x, config = candidate.inputs(setting.batch_size).to(setting.device), builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    entry, sizes = network.get_input(0), tuple(x.shape)
    if -1 in tuple(entry.shape):
        profile = builder.create_optimization_profile()
        profile.set_shape(entry.name, sizes, sizes, sizes)
        config.add_optimization_profile(profile)
    if (plan := builder.build_serialized_network(network, config)) is None:
        raise RuntimeError("TensorRT cannot build an engine of it")
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    context.set_input_shape(entry.name, sizes)
    held = {entry.name: x}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        if name not in held:
            like = np.empty(tuple(context.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))
            held[name] = torch.from_numpy(like).to(setting.device)
        context.set_tensor_address(name, held[name].data_ptr())

    def run() -> Tensor:
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT does not run its engine")
        return held[candidate.results[0]]

    return graphed(run, x)


def openvino_form(candidate: Candidate) -> Any:
    """OpenVINO's reading of the ONNX form, float32, batch size free."""
    return importlib.import_module("openvino").Core().read_model(candidate.form(onnx_form))


def openvino(
    candidate: Candidate, setting: Setting, *, form: Callable[[Candidate], Any] = openvino_form, precision: str = "f32"
) -> Prepared:
    """OpenVINO on the CPU, latency hint, one stream, static batch size, the number format that is asked for (it would take
    bfloat16 by itself).
    """
    ov = importlib.import_module("openvino")
    x = candidate.inputs(setting.batch_size).numpy()
    network = candidate.form(form).clone()
    network.reshape(list(x.shape))
    settings = {"INFERENCE_NUM_THREADS": setting.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = precision
    request = ov.Core().compile_model(network, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x))

    def outputs(images: Tensor) -> Tensor:
        found = request.infer([images.numpy()])[0].copy()
        request.set_input_tensor(ov.Tensor(x))
        return torch.from_numpy(found)

    return Prepared(lambda: request.infer(), outputs)


def ncnn_form(candidate: Candidate) -> tuple[str, bytes]:
    """ncnn's two files, text and weights, as pnnx converts them from a torch.jit trace; float32. Raises UnsupportedModel
    where it cannot."""
    program = Path(str(importlib.util.find_spec("pnnx").origin)).with_name("pnnx")  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript announces its own end
        file = Path(folder) / "network.pt"
        torch.jit.trace(candidate.form(folded_form), candidate.example_inputs, check_trace=False).save(str(file))
        shape = "[" + ",".join(map(str, candidate.example_inputs.shape)) + "]f32"
        command = [str(program), file.name, f"inputshape={shape}", "fp16=0"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        text, weights = file.with_name("network.ncnn.param"), file.with_name("network.ncnn.bin")
        if done.returncode or not text.exists():
            raise UnsupportedModel(
                f"pnnx cannot convert {candidate.name!r} to ncnn: {(done.stderr or done.stdout)[-200:]}"
            )
        return text.read_text(), weights.read_bytes()


def ncnn(candidate: Candidate, setting: Setting) -> Prepared:
    """ncnn on the CPU, float32. It takes one image at a time, so a batch is so many runs. Raises UnsupportedModel for a layer that it
    lacks."""
    ncnn = importlib.import_module("ncnn")
    net = ncnn.Net()
    net.opt.num_threads = setting.threads
    net.opt.use_vulkan_compute = False
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, name, False)
    text, weights = candidate.form(ncnn_form)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("param", text.encode()), ("bin", weights)):
            (Path(folder) / name).write_bytes(content)
        if net.load_param(f"{folder}/param") or net.load_model(f"{folder}/bin"):
            raise UnsupportedModel(f"ncnn cannot load {candidate.name!r}: it lacks a layer")
    (entry,), (end,) = net.input_names(), net.output_names()

    def one(image: Any) -> Any:
        extractor = net.create_extractor()
        extractor.input(entry, image)
        return extractor.extract(end)[1]

    def mats(images: Tensor) -> list[Any]:
        return [ncnn.Mat(image).clone() for image in np.ascontiguousarray(images.numpy())]

    own = mats(candidate.inputs(setting.batch_size))

    def run() -> None:
        for image in own:
            one(image)  # its memory is the network's: nothing to hand out

    return Prepared(run, lambda images: torch.stack([torch.from_numpy(np.array(one(image))) for image in mats(images)]))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No warnings and no bars of packages that talk while they work."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
