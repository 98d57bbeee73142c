"""The number format that an ONNX file computes in, and the same graph in float32, which ONNX Runtime runs on every CPU. No layers."""

from __future__ import annotations

import onnx
import torch

from rmprune.errors import UnsupportedModel

NUMBER_FORMATS: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.DOUBLE: torch.float64,
}
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def format_of(graph: onnx.GraphProto) -> torch.dtype:
    """What convolutions and linear layers compute in; what the first output is where there are none.

    Raises UnsupportedModel where one computes in another format than the next: the network that is written computes in one.
    """
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
    found: dict[torch.dtype, str] = {}
    for node in graph.node:
        given = [kinds[name] for name in node.input if kinds.get(name) in NUMBER_FORMATS]
        held = [a.t.data_type for a in node.attribute if a.HasField("t")] + [
            a.i for a in node.attribute if a.name == "to"
        ]
        kind = next(iter([*held, *given]), onnx.TensorProto.FLOAT)
        kinds |= dict.fromkeys(node.output, kind)
        for each in given if node.op_type in _LAYERS else ():
            found.setdefault(NUMBER_FORMATS[each], node.name or node.output[0])
    if len(found) > 1:
        said = " and ".join(f"{str(dtype).removeprefix('torch.')} ({name[:100]!a})" for dtype, name in found.items())
        raise UnsupportedModel(
            f"its layers compute in {said}; the new file would compute in one format: give the file in float32, or one whose "
            "layers are all converted"
        )
    return next(iter(found), NUMBER_FORMATS.get(graph.output[0].type.tensor_type.elem_type, torch.float32))


def all_float32(graph: onnx.GraphProto) -> None:
    """Rewrites types and casts of a graph whose tensors are in float32 already, in place."""
    graph.ClearField("value_info")
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in NUMBER_FORMATS:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in NUMBER_FORMATS:
                attribute.i = onnx.TensorProto.FLOAT
