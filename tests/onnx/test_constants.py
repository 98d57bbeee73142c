"""What is computed of constants in a graph (rmprune.onnx.constants) is what ONNX's own reference computes; bounds are kept."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rmprune.graph.obstacle import Obstacle
from rmprune.onnx.constants import FOLDED, MOST_VALUES, fold

A, B = np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5, np.full((1, 3), 2, np.float32)
N, D = np.array([7, -7, 8], np.int64), np.array([2, 2, -3], np.int64)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    *((op, [A, B], {}) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Equal")),
    *((op, [A], {}) for op in ("Neg", "Floor", "Ceil", "Identity")),
    ("Sqrt", [abs(A)], {}),
    ("Pow", [A, B], {}),
    ("Div", [N, D], {}),
    ("Where", [A > 0, A, B], {}),
    ("Cast", [A], {"to": onnx.TensorProto.INT64}),
    ("Concat", [A, A], {"axis": 1}),
    ("ConstantOfShape", [ints(2, 3)], {"value": np.array([4], np.int64)}),
    ("Expand", [B, ints(2, 1)], {}),
    ("Gather", [A, ints(2, 0)], {"axis": 1}),
    ("Range", [np.int64(1), np.int64(9), np.int64(3)], {}),
    ("ReduceProd", [A], {"axes": [1], "keepdims": 0}),
    ("Reshape", [A, ints(0, -1, 1)], {}),
    ("Slice", [A, ints(1), ints(2**62), ints(1)], {}),
    ("Slice", [A, ints(0, 0), ints(2, 3), ints(0, 1), ints(1, 2)], {}),
    ("Squeeze", [B, ints(0)], {}),
    ("Transpose", [A], {"perm": [1, 0]}),
    ("Unsqueeze", [A, ints(0, -1)], {}),
]


def test_every_operator_is_tried() -> None:
    assert {op for op, _, _ in CASES} == FOLDED.keys()


@pytest.mark.parametrize(("op", "inputs", "attributes"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_as_the_reference(op: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    names = [f"x{i}" for i in range(len(inputs))]
    given = {k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in attributes.items()}
    inputs = [np.asarray(x) for x in inputs]
    values = [helper.make_tensor_value_info(n, 0, None) for n in [*names, "y"]]
    graph = helper.make_graph([helper.make_node(op, names, ["y"], **given)], "g", values[:-1], values[-1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (wanted,) = ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))
    found = fold(op, inputs, attributes)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape and np.array_equal(found, wanted)


LARGE = np.zeros((2**13, 1), np.float32)
WIDE = np.broadcast_to(np.int64(0), MOST_VALUES // 2)
REFUSED: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("Add", [LARGE, LARGE.T], {}, "too large"),
    ("Concat", [WIDE, WIDE, ints(1)], {"axis": 0}, "makes a tensor of sizes"),
    ("Gather", [A, np.broadcast_to(0, MOST_VALUES)], {"axis": 1}, "makes a tensor of sizes"),
    ("ConstantOfShape", [ints(MOST_VALUES + 1)], {}, "makes a tensor of sizes"),
    ("Expand", [B, ints(MOST_VALUES, 1)], {}, "makes a tensor of sizes"),
    ("Range", [np.int64(0), np.int64(MOST_VALUES + 1), np.int64(1)], {}, "makes a tensor of sizes"),
    ("Cast", [A], {"to": onnx.TensorProto.STRING}, "makes another type"),
    ("Div", [N, 0 * D], {}, "divides by 0"),
    ("Slice", [A, ints(1), ints(0), ints(1), ints(-1)], {}, "goes backwards"),
    ("Unsqueeze", [A, ints(0, 0)], {}, "its axes are"),
    ("Reshape", [A, ints(4, -1)], {}, "makes .* of"),
]


@pytest.mark.parametrize(("op", "inputs", "attributes", "why"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_refused(op: str, inputs: list[Any], attributes: dict[str, Any], why: str) -> None:
    with pytest.raises(Obstacle, match=why):
        fold(op, [np.asarray(x) for x in inputs], attributes)
