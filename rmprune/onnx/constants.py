"""What an ONNX graph computes of sizes and constants, by numpy: a closed list of operators, sizes checked first. No layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rmprune.graph.obstacle import Obstacle

Array = np.ndarray[Any, Any]
MOST_VALUES = 2**24  # of a tensor that is computed from sizes (anchors of a detector have 10,000)
MOST_OF_ALL = 2**26  # of all such tensors together, beside a few times what stands in the file


def fold(op: str, inputs: list[Array | None], attributes: Mapping[str, Any]) -> Array:
    """The result of an operator of FOLDED on known values. Raises Obstacle where it would be larger than MOST_VALUES."""
    shapes = [value.shape for value in inputs if value is not None]
    if op in _BROADCAST and math.prod(np.broadcast_shapes(*shapes)) > MOST_VALUES:
        raise Obstacle("what it computes of constants is too large")
    with np.errstate(all="ignore"):
        return np.asarray(FOLDED[op](inputs, attributes))


def axes_of(inputs: list[Array | None], attributes: Mapping[str, Any]) -> tuple[int, ...] | None:
    """`axes`, an attribute in older opsets and the second input in newer ones; None where they are not said."""
    given = inputs[1] if len(inputs) > 1 else None
    found = attributes.get("axes") if given is None else given.reshape(-1).tolist()
    return None if found is None else tuple(int(axis) for axis in found)


def unsqueezed(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with axes of size 1 put in, where they stand in the result."""
    rank = len(shape) + len(axes)
    new = {axis % rank for axis in axes}
    rest = iter(shape)
    if len(new) < len(axes) or any(not -rank <= axis < rank for axis in axes):
        raise Obstacle(f"its axes are {axes}")
    return tuple(1 if axis in new else next(rest) for axis in range(rank))


def slices(rank: int, starts: Array, ends: Array, axes: Array | None, steps: Array | None) -> tuple[slice, ...]:
    """ONNX's Slice as Python's, for each of `rank` axes. Raises Obstacle for steps backwards."""
    index = [slice(None)] * rank
    numbers = [x.reshape(-1).tolist() for x in (starts, ends)]
    where = list(range(len(numbers[0]))) if axes is None else axes.reshape(-1).tolist()
    strides = [1] * len(where) if steps is None else steps.reshape(-1).tolist()
    for start, end, axis, step in zip(*numbers, where, strides, strict=True):
        if step < 1:
            raise Obstacle("it goes backwards")
        open_end = end >= 2**31 - 1
        index[axis] = slice(start or None, None if open_end else end, None if step == 1 else step)
    return tuple(index)


def reshaped(shape: tuple[int, ...], target: list[int], allow_zero: bool = False) -> tuple[int, ...]:
    """The shape that Reshape gives: 0 keeps a size, -1 is what is left. Raises Obstacle where the values do not fit."""
    sizes = [shape[i] if size == 0 and not allow_zero and i < len(shape) else size for i, size in enumerate(target)]
    known, count = math.prod(size for size in sizes if size != -1), math.prod(shape)
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes = [count // known if size == -1 else size for size in sizes]
    if min(sizes, default=1) < 0 or math.prod(sizes) != count:
        raise Obstacle(
            f"it makes {target} of {list(shape)}, for it takes another --image-size, or mixes the number of images with other sizes"
        )
    return tuple(sizes)


def _of_sizes(sizes: Array) -> tuple[int, ...]:
    found = tuple(int(size) for size in sizes.reshape(-1))
    if len(found) > 8 or min(found, default=0) < 0 or math.prod(found) > MOST_VALUES:
        raise Obstacle(f"it makes a tensor of sizes {list(found)[:8]}")
    return found


def _constant_of_shape(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    value = attributes.get("value", np.zeros(1, np.float32))
    return np.full(_of_sizes(inputs[0]), value.reshape(-1)[0], value.dtype)


def _expand(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    shape = np.broadcast_shapes(inputs[0].shape, _of_sizes(inputs[1]))
    return np.broadcast_to(inputs[0], _of_sizes(np.array(shape)))


def _range(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    start, end, step = (value.reshape(-1)[0] for value in inputs)
    _of_sizes(np.array([max(0, math.ceil((end - start) / step))]))
    return np.arange(start, end, step, dtype=inputs[0].dtype)


def _cast(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    types = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
    if attributes["to"] not in types:
        raise Obstacle("it makes another type than float32, float64, float16, int32, int64 or bool")
    return inputs[0].astype(types[attributes["to"]])


def _div(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    a, b = inputs
    if not np.issubdtype(a.dtype, np.integer):
        return a / b
    if not b.all():
        raise Obstacle("it divides by 0")
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)  # ONNX cuts off towards 0


def _squeeze(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    return np.squeeze(inputs[0], axes_of(inputs, attributes))


def _unsqueeze(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    return inputs[0].reshape(unsqueezed(inputs[0].shape, axes_of(inputs, attributes) or ()))


def _slice(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    if len(inputs) == 1:
        inputs = inputs + [np.array(attributes[name]) for name in ("starts", "ends", "axes") if name in attributes]
    return inputs[0][slices(inputs[0].ndim, inputs[1], inputs[2], *[*inputs[3:], None, None][:2])]


def _reshape(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    target = [int(size) for size in inputs[1].reshape(-1)]
    return inputs[0].reshape(reshaped(inputs[0].shape, target, bool(attributes.get("allowzero"))))


def _concat(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    _of_sizes(np.array([sum(value.size for value in inputs)]))
    return np.concatenate(inputs, attributes["axis"])


def _gather(inputs: list[Any], attributes: Mapping[str, Any]) -> Array:
    axis = attributes.get("axis", 0)
    _of_sizes(np.array([inputs[1].size, inputs[0].size // max(1, inputs[0].shape[axis])]))
    return np.take(inputs[0], inputs[1], axis)


def _plain(function: Callable[..., Any]) -> Callable[[list[Any], Mapping[str, Any]], Array]:
    return lambda inputs, attributes: function(*inputs)


_BROADCAST = ("Add", "Sub", "Mul", "Div", "Equal", "Where", "Min", "Max", "Pow")
_BY_NUMPY: dict[str, Callable[..., Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Neg": np.negative, "Floor": np.floor, "Ceil": np.ceil,
    "Sqrt": np.sqrt, "Min": np.minimum, "Max": np.maximum, "Equal": np.equal, "Where": np.where, "Identity": np.asarray,
}  # fmt: skip
FOLDED: dict[str, Callable[[list[Any], Mapping[str, Any]], Array]] = {
    **{op: _plain(function) for op, function in _BY_NUMPY.items()},
    "Div": _div,
    "Pow": lambda inputs, attributes: np.power(*inputs).astype(inputs[0].dtype),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Gather": _gather,
    "Range": _range,
    "ReduceProd": lambda inputs, attributes: np.prod(
        inputs[0], axes_of(inputs, attributes), keepdims=bool(attributes.get("keepdims", 1))
    ),
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": lambda inputs, attributes: np.transpose(inputs[0], attributes.get("perm")),
    "Unsqueeze": _unsqueeze,
}
