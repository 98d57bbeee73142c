"""Where the time of a network goes, layer by layer, as ONNX Runtime's own profiler sees it. Whole networks are latency.py's business."""

import importlib
import json
import math
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from rmprune.errors import ConfigError
from rmprune.graph.inputs import Inputs, as_tuple
from rmprune.measure.backends import says_what_fails
from rmprune.measure.candidate import Candidate, onnx_form
from rmprune.measure.runtimes import session_options

if TYPE_CHECKING:
    import pandas as pd  # imported where a table is made: it takes 0.2 s

_LEAST = 5
_ADDED = re.compile(r"(/MatmulTransposeFusion/|_nchwc|_token_\d+)$")


def profile_layers(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    *,
    threads: int = 2,
    batch_size: int | None = None,
    runs: int = 50,
) -> "pd.DataFrame":
    """One row for each kernel that ONNX Runtime runs on the CPU, in order: network, position, layer, operator, cin, cout, macs, ms, share.

    `models`: for example {"before": net, "after": plain}; they run in turns, in one process. `example_inputs`: (N, C, H, W), or several
    inputs; `batch_size` defaults to N. `cin`, `cout` and `macs` (of one image) are those of the layer, where a kernel computes one. `ms` is
    the median over `runs` for a whole batch, of a kernel with what was fused into it; `share` is of the network's sum. A profiler slows
    what it watches: compare shares, and measure whole networks by `measure_latencies`. Raises ConfigError for no runs or no threads.

    >>> table = profile_layers({"net": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())}, torch.randn(1, 3, 8, 8), runs=3)
    >>> bool("Conv" in set(table.operator)), round(float(table.share.sum()), 6), int(table.macs.sum())  # 3 * 8 * 3 * 3 * 6 * 6
    (True, 1.0, 7776)
    """
    import pandas as pd

    if runs < 1 or threads < 1:
        raise ConfigError("runs and threads must be at least 1")
    inputs = as_tuple(next(iter(models.values())), example_inputs)
    candidates = {name: Candidate(name, model, inputs) for name, model in models.items()}
    found = profile_candidates(candidates, threads, batch_size or len(inputs[0]), runs=runs)
    rows = [{"network": name, "position": n} | row for name, own in found.items() for n, row in enumerate(own)]
    return pd.DataFrame(rows)


def profile_candidates(
    candidates: Mapping[str, Candidate], threads: int, batch_size: int, *, runs: int = 50, seconds: float = math.inf
) -> dict[str, list[dict[str, Any]]]:
    """The rows of `profile_layers` by network, of candidates; fewer runs (5 at least) once `seconds` a network are over."""
    with tempfile.TemporaryDirectory() as folder:
        sessions: dict[str, tuple[Any, dict[str, Any]]] = {}
        for number, (name, candidate) in enumerate(candidates.items()):
            with says_what_fails(name, "onnxruntime"):
                session = _session(candidate, threads, str(Path(folder) / str(number)))
            inputs = zip(candidate.names, candidate.batch(batch_size), strict=True)
            sessions[name] = (session, {key: x.numpy() for key, x in inputs})
        start = time.perf_counter()
        for run in range(runs + 1):
            for name, (session, feed) in sessions.items():
                with says_what_fails(name, "onnxruntime"):
                    session.run(None, feed)
            if run >= _LEAST and time.perf_counter() - start > seconds * len(sessions):
                break
        found = {}
        for name, (session, _) in sessions.items():
            kernels = _kernels(json.loads(Path(session.end_profiling()).read_text()))
            total = sum(kernel.ms for kernel in kernels) or 1.0  # whole microseconds, of which a kernel may take none
            layers = _layers(_graph(candidates[name].form(onnx_form)), kernels, batch_size)
            found[name] = [
                layer._asdict() | {"ms": kernel.ms, "share": kernel.ms / total}
                for kernel, layer in zip(kernels, layers, strict=True)
            ]
    return found


def _session(candidate: Candidate, threads: int, prefix: str) -> Any:
    onnxruntime, options = importlib.import_module("onnxruntime"), session_options(threads)
    options.enable_profiling, options.profile_file_prefix = True, prefix
    return onnxruntime.InferenceSession(candidate.form(onnx_form), options, providers=["CPUExecutionProvider"])


class _Kernel(NamedTuple):
    name: str
    operator: str
    ms: float
    takes: list[list[int]]
    gives: list[int]
    """Shapes of the inputs and of the first output."""


class _Layer(NamedTuple):
    layer: str
    operator: str
    cin: int | None
    cout: int | None
    macs: int | None


def _kernels(events: list[dict[str, Any]]) -> list[_Kernel]:
    """In order of running, with the median time; the first run, which allocates, is left out."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event)
    found = []
    for (name, operator), own in runs.items():
        takes, gives = (
            [shape for one in own[0]["args"].get(f"{side}_type_shape", []) for shape in one.values()]
            for side in ("input", "output")
        )
        ms = statistics.median(event["dur"] / 1e3 for event in own[1:] or own)
        found.append(_Kernel(name, operator, ms, takes, gives[0] if gives else []))
    return found


def _graph(form: bytes | str) -> Any:
    """Of an ONNX file, or of the bytes of one; large weights that lie beside it stay there."""
    onnx = importlib.import_module("onnx")
    whole = onnx.load_from_string(form) if isinstance(form, bytes) else onnx.load(form, load_external_data=False)
    return whole.graph


def _layers(graph: Any, kernels: list[_Kernel], batch_size: int) -> list[_Layer]:
    """The layer of the network that each kernel computes, by the name of its weights; other kernels keep the runtime's name.

    ONNX Runtime calls a kernel as the node it came from, or after the last tensor of what was fused into it, and adds to the name.
    """
    made = {output: node for node in graph.node for output in node.output}
    named = {node.name: node for node in graph.node}
    weights = {tensor.name: (tensor.name, tuple(tensor.dims)) for tensor in graph.initializer}
    weights |= {
        node.output[0]: weights[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
    starts = [_ADDED.sub("", kernel.name) for kernel in kernels]
    ends = set(starts)

    def own(node: Any, kind: str) -> Any:
        """Back from the end of a fused kernel to its layer; what another kernel ends with is that one's."""
        if node is None or node.op_type in kind:
            return node
        before = (made.get(name) for name in node.input if name not in ends)
        return next((found for found in (own(b, kind) for b in before if b is not None) if found is not None), None)

    found = []
    for kernel, start in zip(kernels, starts, strict=True):
        node = own(named.get(start) or made.get(start), kernel.operator)
        weight, dims = next((weights[name] for name in node.input if name in weights), ("", ())) if node else ("", ())
        if not weight:
            found.append(_Layer(kernel.name, kernel.operator, None, None, _macs(kernel, node, (), batch_size)))
            continue
        # A transposed copy of the weights has a number for a name, and its node the layer's: "/head/fc/MatMul".
        name = node.name.strip("/").rpartition("/")[0].replace("/", ".") if weight.startswith("onnx::") else weight
        name = name.removesuffix("_quantized").removesuffix(".weight") or kernel.name
        found.append(_Layer(name, kernel.operator, *_widths(node, dims), _macs(kernel, node, dims, batch_size)))
    return found


def _widths(node: Any, weight: tuple[int, ...]) -> tuple[int | None, int | None]:
    """Channels in and out of a node with such weights; None of what is no layer of channels."""
    said = {attribute.name: attribute.i for attribute in node.attribute}
    groups = said.get("group", 1)
    if node.op_type == "Conv":
        return weight[1] * groups, weight[0]
    if node.op_type == "ConvTranspose":
        return weight[0], weight[1] * groups
    if node.op_type in ("Gemm", "MatMul") and len(weight) == 2:
        cin, cout = reversed(weight) if said.get("transB") else weight
        return cin, cout
    return None, None


def _macs(kernel: _Kernel, node: Any, weight: tuple[int, ...], batch_size: int) -> int | None:
    """Multiply-accumulates for one image, as `count_macs` counts them; None of what has none, or is not known by its weights."""
    kind = "" if node is None else node.op_type
    if weight and kind in ("Conv", "ConvTranspose"):
        if kernel.operator == "QLinearConv":  # channels may come last
            return math.prod(weight[1:]) * math.prod(kernel.gives) // batch_size or None
        shape = kernel.gives if kind == "Conv" else kernel.takes[0]  # whose channels may be padded
        return math.prod(weight) * shape[0] * math.prod(shape[2:]) // batch_size or None
    if kind in ("Gemm", "MatMul"):  # [..., rows, inner] times [..., inner, columns]
        if weight:
            inner = _widths(node, weight)[0]
        else:  # the first may come transposed
            first = kernel.takes[0]
            inner = first[-1] if first[-2:-1] in ([], kernel.gives[-2:-1]) else first[-2]
        return None if inner is None else math.prod(kernel.gives) * inner // batch_size or None
    return None
