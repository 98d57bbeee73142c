"""A graph as torch exports it, without its weights, and the file of both, or two: one can hold 2 GiB. Checks nothing."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

Weights = dict[str, np.ndarray[Any, Any]]
EXTERNAL_OVER = 2**31 - 2**20  # bytes of weights that one file can hold besides its graph
_BESIDE = 1024  # bytes of the smallest tensor that lies beside the graph then
_NEWEST = 20  # the last opset that the exporter knows; onnx's own converter goes on from there


def bare_graph(
    network: nn.Module, inputs: tuple[Tensor, ...], names: tuple[list[str], list[str]], axes: Mapping[str, Any], opset: int
) -> tuple[onnx.ModelProto, Weights]:  # fmt: skip
    """The graph of a float32 CPU network in eval mode, and its weights by name, which it does not hold: they share its memory.

    names: of inputs and outputs; axes: {name: {axis: name}} of open sizes. Raises whatever torch's exporter does.
    """
    buffer = io.BytesIO()
    with quiet_export(), torch.no_grad():
        torch.onnx.export(
            network, inputs, buffer, dynamo=False, opset_version=min(opset, _NEWEST),  # type: ignore[arg-type]  # a file object is documented
            input_names=names[0], output_names=names[1], dynamic_axes=axes, export_params=False, do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )  # fmt: skip
    proto = onnx.load_from_string(buffer.getvalue())
    if opset > _NEWEST:
        proto = onnx.version_converter.convert_version(proto, opset)
    own = {value.name for value in proto.graph.input} - set(names[0])
    given = [value for value in proto.graph.input if value.name not in own]
    proto.graph.ClearField("input")
    proto.graph.input.extend(given)
    state = network.state_dict(keep_vars=True)
    weights = {name: state[name].detach().numpy() for name in own}
    _fold_weights(proto.graph, weights)
    return proto, weights


def _fold_weights(graph: onnx.GraphProto, weights: Weights) -> None:
    """Weights that the graph would transpose or copy are written so; one that nothing reads then is left out."""
    for node in list(graph.node):
        if node.op_type in ("Transpose", "Identity") and node.input[0] in weights and len(node.output) == 1:
            order = [list(a.ints) for a in node.attribute if a.name == "perm"]
            value = weights[node.input[0]]
            weights[node.output[0]] = np.transpose(value, *order) if node.op_type == "Transpose" else value
            graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for name in weights.keys() - read:
        del weights[name]


def write_proto(proto: onnx.ModelProto, weights: Weights, path: Path) -> None:
    """Writes both as an ONNX file; over EXTERNAL_OVER bytes the weights lie in PATH.data beside it."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    large = sum(value.nbytes for value in weights.values()) > EXTERNAL_OVER
    proto.graph.ClearField("initializer")
    with data.open("wb") if large else contextlib.nullcontext() as file:
        for name, value in weights.items():
            value = np.ascontiguousarray(value)
            if file is None or value.nbytes < _BESIDE:
                proto.graph.initializer.append(numpy_helper.from_array(value, name))
                continue
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            tensor = proto.graph.initializer.add(name=name, dims=value.shape, data_type=kind)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, said in (("location", data.name), ("offset", file.tell()), ("length", value.nbytes)):
                tensor.external_data.add(key=key, value=str(said))
            file.write(value.data)
    path.write_bytes(proto.SerializeToString())


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """The exporter warns that it is the older one and logs; neither is for the user. Attention is exported as its parts."""
    logger = logging.getLogger("torch.onnx")
    level, fused = logger.level, torch.backends.mha.get_fastpath_enabled()
    logger.setLevel(logging.ERROR)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(fused)
