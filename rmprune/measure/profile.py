"""Where the time of a network goes, layer by layer, as ONNX Runtime's own profiler sees it. Whole networks are latency.py's business."""

import importlib
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rmprune.errors import ConfigError
from rmprune.measure.candidate import Candidate, onnx_form

if TYPE_CHECKING:
    import pandas as pd  # imported where a table is made: it takes 0.2 s


def profile_layers(
    models: Mapping[str, nn.Module],
    example_inputs: Tensor,
    *,
    threads: int = 2,
    batch_size: int | None = None,
    runs: int = 50,
) -> "pd.DataFrame":
    """One row for each kernel that ONNX Runtime runs on the CPU, in order: network, position, layer, operator, ms, share.

    `models`: for example {"before": net, "after": plain}; they run in turns, in one process. `ms` is the median over `runs` for a
    whole batch, of a kernel with what was fused into it; `share` is of the network's sum. A profiler slows what it watches: compare
    shares, and measure whole networks by `measure_latencies`. `example_inputs`: (N, C, H, W), `batch_size` defaults to N.

    >>> table = profile_layers({"net": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())}, torch.randn(1, 3, 8, 8), runs=3)
    >>> bool("Conv" in set(table.operator)), round(float(table.share.sum()), 6)
    (True, 1.0)
    """
    import pandas as pd

    if runs < 1 or threads < 1:
        raise ConfigError("runs and threads must be at least 1")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        sessions: dict[str, Any] = {}
        for number, (name, model) in enumerate(models.items()):
            candidate = Candidate(name, model, example_inputs)
            feed = {"input": candidate.inputs(batch_size or len(example_inputs)).numpy()}
            session = _session(candidate, threads, str(Path(folder) / str(number)))
            sessions[name] = (
                session,
                feed,
                importlib.import_module("onnx").load_from_string(candidate.form(onnx_form)).graph,
            )
        for _ in range(runs + 1):
            for session, feed, _ in sessions.values():
                session.run(None, feed)
        for name, (session, _, graph) in sessions.items():
            kernels = _kernels(json.loads(Path(session.end_profiling()).read_text()))
            names = _layers(graph, [(kernel, kind) for kernel, kind, _ in kernels])
            total = sum(ms for _, _, ms in kernels)
            rows += [
                {"network": name, "position": n, "layer": names[n], "operator": kind, "ms": ms, "share": ms / total}
                for n, (_, kind, ms) in enumerate(kernels)
            ]
    return pd.DataFrame(rows)


def _session(candidate: Candidate, threads: int, prefix: str) -> Any:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_profiling, options.profile_file_prefix = True, prefix
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(candidate.form(onnx_form), options, providers=["CPUExecutionProvider"])


def _kernels(events: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """(kernel, operator, median ms) in order of running; the first run, which allocates, is left out."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"] / 1e3)
    return [(kernel, kind, statistics.median(found[1:] or found)) for (kernel, kind), found in times.items()]


def _layers(graph: Any, kernels: list[tuple[str, str]]) -> list[str]:
    """The layer of the network that each kernel computes, by the name of its weights; other kernels keep the runtime's name.

    ONNX Runtime calls a kernel as the node it came from, or after the last tensor of what was fused into it ("..._nchwc").
    """
    made = {output: node for node in graph.node for output in node.output}
    named = {node.name: node for node in graph.node}
    weights = {tensor.name for tensor in graph.initializer}
    ends = {kernel.removesuffix("_nchwc") for kernel, _ in kernels}

    def own(node: Any, kind: str) -> Any:
        """Back from the end of a fused kernel to its layer; what another kernel ends with is that one's."""
        if node is None or node.op_type in kind:
            return node
        before = (made.get(name) for name in node.input if name not in ends)
        return next((found for found in (own(b, kind) for b in before if b is not None) if found is not None), None)

    found = []
    for kernel, kind in kernels:
        node = own(named.get(kernel) or made.get(kernel.removesuffix("_nchwc")), kind)
        weight = next((name for name in node.input if name in weights), None) if node is not None else None
        found.append(weight.removesuffix(".weight") if weight else kernel)
    return found
