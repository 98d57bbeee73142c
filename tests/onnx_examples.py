"""ONNX files written by hand: graphs of one operator, and a small residual network as other exporters write one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]


def graph_of(
    nodes: list[onnx.NodeProto], weights: Mapping[str, Array], sizes: list[Any], opset: int = 17, outputs: tuple[str, ...] = ("y",),
    ir: int = 8,
) -> onnx.ModelProto:  # fmt: skip
    """A model of nodes that read `x` of these sizes, and weights, and give `y`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def one(op: str, *weights: Any, opset: int = 17, sizes: Any = (2, 4, 6, 8), **attributes: Any) -> onnx.ModelProto:
    """A graph of one operator that reads `x` and these weights; None leaves an input out."""
    named = {f"w{i}": np.asarray(value) for i, value in enumerate(weights) if value is not None}
    inputs = ["x", *("" if value is None else f"w{i}" for i, value in enumerate(weights))]
    return graph_of([helper.make_node(op, inputs, ["y"], name="n", **attributes)], named, list(sizes), opset)


def normal(*sizes: int, seed: int = 0) -> Array:
    """float32, normal."""
    return np.random.default_rng(seed).standard_normal(sizes).astype(np.float32)


def residual(batch: Any = "batch", pixels: Any = (8, 8), opset: int = 17) -> onnx.ModelProto:
    """Convolution, a block of two with an identity shortcut, pool, and a linear layer; names, metadata and sizes of its own."""
    weights = {
        "a": normal(4, 3, 3, 3), "b": normal(4, 4, 3, 3, seed=1) / 6, "c": normal(4, 4, 3, 3, seed=2) / 6, "d": normal(5, 4, seed=3),
        "e": normal(5),
    }  # fmt: skip
    same = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["1"], **same),
        helper.make_node("Relu", ["1"], ["2"]),
        helper.make_node("Conv", ["2", "b"], ["3"], **same),
        helper.make_node("Relu", ["3"], ["4"]),
        helper.make_node("Conv", ["4", "c"], ["5"], **same),
        helper.make_node("Add", ["5", "2"], ["6"], name="block"),
        helper.make_node("Relu", ["6"], ["7"]),
        helper.make_node("GlobalAveragePool", ["7"], ["8"]),
        helper.make_node("Flatten", ["8"], ["9"]),
        helper.make_node("Gemm", ["9", "d", "e"], ["scores/out:0"], transB=1),
    ]
    model = graph_of(nodes, weights, [batch, 3, *pixels], opset, ("scores/out:0",))
    model.graph.input[0].name = nodes[0].input[0] = model.graph.node[0].input[0] = "image:0"
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    for size in (batch, 5):
        dim = model.graph.output[0].type.tensor_type.shape.dim.add()
        dim.dim_param, dim.dim_value = ("", size) if isinstance(size, int) else (size, 0)  # the later of the two counts
        if not isinstance(size, int):
            dim.dim_param = size
    helper.set_model_props(model, {"labels": "a,b,c,d,e", "stride": "8"})
    model.doc_string, model.graph.name = "trained elsewhere", "camera"
    return model


def written(model: onnx.ModelProto, path: Path) -> Path:
    """The model as a file."""
    path.write_bytes(model.SerializeToString())
    return path
