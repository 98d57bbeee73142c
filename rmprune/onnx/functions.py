"""ONNX operators that are functions of tensors: arithmetic, shapes, pieces, padding. Every attribute is asked for; the others refuse."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from rmprune.graph.obstacle import Obstacle
from rmprune.onnx.constants import Array, axes_of, reshaped, slices
from rmprune.onnx.drawing import IN_EVAL, Call, NamedSum, shapes
from rmprune.onnx.formats import NUMBER_FORMATS
from rmprune.onnx.resize import resize

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.truediv, "Pow": torch.pow,
    "Max": torch.maximum, "Min": torch.minimum, "Sum": operator.add,
}  # fmt: skip
_ELEMENTWISE = {name: getattr(torch, name.lower()) for name in ("Abs", "Exp", "Erf", "Log", "Neg", "Sqrt")}
_REDUCTIONS = {"ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin}


def _arithmetic(call: Call) -> Any:
    function = _ARITHMETIC[call.op]
    if len(call.values) < 2:
        if call.op not in ("Max", "Min", "Sum"):
            raise Obstacle("its second input is missing")
        return call.source()
    found = _two(call, function, 0, 1)
    for place in range(2, len(call.values)):
        if call.op not in ("Max", "Min", "Sum"):
            raise Obstacle(f"it has {len(call.values)} inputs")
        found = call.ask(function, found, call.source(place))
    return found


def _two(call: Call, function: Any, first: int, second: int) -> fx.Node:
    """A function of two inputs; a constant of one entry is a plain number where it does not widen the other."""
    if function in (operator.add, operator.mul) and not isinstance(call.values[first], fx.Node):
        first, second = second, first
    if function is operator.add and isinstance(call.values[second], fx.Node):
        return call.drawing.layer(call.name, NamedSum(), call.source(first), call.source(second))
    numbers = function not in (torch.maximum, torch.minimum)
    if numbers and isinstance(call.values[first], fx.Node) and (value := call.number(second)) is not None:
        whole = value.is_integer() and abs(value) < 2**31
        return call.ask(function, call.source(first), int(value) if whole else value)
    if numbers and function is operator.truediv and (value := call.number(first)) is not None:
        return call.ask(function, value, call.source(second))
    return call.ask(function, call.source(first), call.source(second))


def _elementwise(call: Call) -> fx.Node:
    return call.ask(_ELEMENTWISE[call.op], call.source())


def _reciprocal(call: Call) -> fx.Node:
    return call.ask(operator.truediv, 1.0, call.source())


def _cast(call: Call) -> fx.Node:
    """Between formats of floating point: none here, since the whole network is read in one."""
    call.attribute("saturate")
    source, kind = call.source(), call.attribute("to")
    if kind not in NUMBER_FORMATS or not source.meta["seen"][0].is_floating_point():
        raise Obstacle(f"to={kind} is not read of images, only casts between float32, float16 and double")
    return source


def _same(call: Call) -> Any:
    """Identity, and Dropout as it is outside of training."""
    if call.op == "Dropout":
        call.attribute("ratio"), call.attribute("seed")
        if call.given(2) and bool(call.known(2, "training_mode").any()):
            raise Obstacle(f"training_mode is on; {IN_EVAL}")
    return call.values[0]


def _axes(call: Call, since: int) -> tuple[int, ...] | None:
    """`axes`: an attribute before this opset, the second input from then on; from 0 upwards."""
    given: list[Array | None] = [None, call.known(1, "axes")] if call.opset >= since and call.given(1) else [None]
    found = axes_of(given, {"axes": call.attribute("axes")})
    rank = len(call.shape())
    if found is not None and not all(-rank <= axis < rank for axis in found):
        raise Obstacle(f"its axes are {list(found)}, of {rank}")
    return None if found is None else tuple(sorted(axis % rank for axis in found))


def _reduce(call: Call) -> Any:
    axes = _axes(call, 13 if call.op == "ReduceSum" else 18)
    keep, nothing = bool(call.attribute("keepdims", 1)), bool(call.attribute("noop_with_empty_axes", 0))
    if not axes and nothing:
        return call.source()
    return call.ask(_REDUCTIONS[call.op], call.source(), list(axes or range(len(call.shape()))), keep)


def _softmax(call: Call) -> fx.Node:
    rank = len(call.shape())
    axis = call.attribute("axis", -1 if call.opset >= 13 else 1) % rank
    if call.opset < 13 and math.prod(call.shape()[axis + 1 :]) > 1:
        raise Obstacle("before opset 13 it goes over several axes at once; convert the file by onnx.version_converter")
    return call.layer((nn.Softmax if call.op == "Softmax" else nn.LogSoftmax)(axis))


def _concat(call: Call) -> fx.Node:
    axis = call.attribute("axis", 1) % len(call.shape())
    return call.ask(torch.cat, [call.source(i) for i in range(len(call.values))], axis)


def _flatten(call: Call) -> fx.Node:
    call.only("axis", 1)
    return call.layer(nn.Flatten(1)) if len(call.shape()) > 1 else call.ask(torch.unsqueeze, call.source(), 1)


def _reshape(call: Call) -> Any:
    given, keeps = call.values[1] if call.given(1) else None, bool(call.attribute("allowzero", 0))
    if given is None or isinstance(given, fx.Node):
        raise Obstacle("its sizes are computed from the values of images")
    targets = [[int(size) for size in sizes.reshape(-1)] for sizes in given]
    one, other = shapes(call.source())
    if keeps and any(0 in target for target in targets):
        raise Obstacle("it makes a tensor without values")
    if call.fixed_batch is not None and targets[1][:1] == [call.fixed_batch] and one[0] == call.fixed_batch:
        targets[1] = [other[0], *targets[1][1:]]  # the file says the number of images; so far it is free here
    return _to_shape(call, reshaped(one, targets[0], keeps), reshaped(other, targets[1], keeps))


def _to_shape(call: Call, first: tuple[int, ...], second: tuple[int, ...]) -> Any:
    """The input in a shape that is given for two batch sizes."""
    one, other = shapes(call.source())
    if (first, second) == (one, other):
        return call.source()
    if len(first) == len(second) == 2 and (first[0], second[0]) == (one[0], other[0]) and len(one) > 2:
        return call.layer(nn.Flatten(1))
    if len(first) != len(second) or sum(a != b for a, b in zip(first, second, strict=True)) != 1:
        raise Obstacle(f"it makes {list(first)} of {list(one)}: the number of images is mixed with other sizes")
    return call.ask(
        torch.reshape, call.source(), tuple(a if a == b else -1 for a, b in zip(first, second, strict=True))
    )


def _squeeze(call: Call) -> Any:
    axes, (one, other) = _axes(call, 13), shapes(call.source())
    gone = [i for i, size in enumerate(one) if size == 1] if axes is None else list(axes)
    if any(one[axis] != 1 or other[axis] != 1 for axis in gone):
        raise Obstacle(f"it takes away axes {gone} of {list(one)}, which are not all 1 for every number of images")
    left = [[size for axis, size in enumerate(shape) if axis not in gone] for shape in (one, other)]
    return _to_shape(call, tuple(left[0]), tuple(left[1])) if gone and 0 not in gone else _taken(call, gone)


def _taken(call: Call, axes: list[int]) -> Any:
    found = call.source()
    for axis in reversed(axes):
        found = call.ask(torch.squeeze, found, axis)
    return found


def _unsqueeze(call: Call) -> Any:
    given: list[Array | None] = [None, call.known(1, "axes")] if call.opset >= 13 else [None]
    axes = axes_of(given, {"axes": call.attribute("axes")}) or ()
    rank, found = len(call.shape()) + len(axes), call.source()
    for axis in sorted(axis % rank for axis in axes):
        found = call.ask(torch.unsqueeze, found, axis)
    return found


def _transpose(call: Call) -> fx.Node:
    order = call.attribute("perm") or list(reversed(range(len(call.shape()))))
    return call.ask(torch.permute, call.source(), tuple(order))


def _slice(call: Call) -> fx.Node:
    rank = len(call.shape())
    if call.opset < 10:
        given = [call.attribute(name) for name in ("starts", "ends", "axes")] + [None]
        parts = [None if value is None else np.array(value) for value in given]
    else:
        parts = [call.known(i, "range") if call.given(i) else None for i in (1, 2, 3, 4)]
    if parts[0] is None or parts[1] is None:
        raise Obstacle("its starts and ends are missing")
    index = slices(rank, parts[0], parts[1], parts[2], parts[3])
    while len(index) > 1 and index[-1] == slice(None):
        index = index[:-1]
    return call.ask(operator.getitem, call.source(), index)


def _split(call: Call) -> list[fx.Node]:
    axis, size = call.attribute("axis", 0) % len(call.shape()), 0
    given = call.known(1, "split").tolist() if call.given(1) else call.attribute("split")
    count = call.attribute("num_outputs", call.outputs)
    total = call.shape()[axis]
    each = -(-total // count)
    sizes = given or [min(each, total - i * each) for i in range(count)]
    if sum(sizes) != total or len(sizes) != call.outputs or (not given and call.opset < 18 and total % count):
        raise Obstacle(f"it cuts {total} into pieces of {sizes}")
    found = []
    for part in sizes:
        index = (*[slice(None)] * axis, slice(size, size + part))
        found.append(call.ask(operator.getitem, call.source(), index))
        size += part
    return found


def _gather(call: Call) -> fx.Node:
    axis = call.attribute("axis", 0) % len(call.shape())
    places = call.known(1, "indices")
    count = call.shape()[axis]
    if places.ndim > 1 or not bool(((places >= -count) & (places < count)).all()):
        raise Obstacle(f"its indices have sizes {list(places.shape)}, or reach beyond the {count} that there are")
    if places.ndim == 0:
        return call.ask("select", call.source(), axis, int(places))
    return call.ask(torch.index_select, call.source(), axis, call.drawing.constant(places % count))


def _pad(call: Call) -> fx.Node:
    rank, mode = len(call.shape()), call.attribute("mode", b"constant").decode()
    pads = call.attribute("pads") if call.opset < 11 else call.known(1, "pads").tolist()
    value = call.attribute("value", 0.0) if call.opset < 11 else 0.0
    if call.opset >= 11 and call.given(2):
        value = float(call.known(2, "value").reshape(-1)[0])
    axes = [int(a) % rank for a in call.known(3, "axes")] if call.given(3) else list(range(rank))
    if not pads or len(pads) != 2 * len(axes):
        raise Obstacle(f"its pads are {pads} for {len(axes)} axes")
    both = dict.fromkeys(range(rank), (0, 0)) | {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    flat = [p for axis in reversed(range(rank)) for p in both[axis]]  # torch says the last axis first
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    names = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in names or (mode != "constant" and min(flat) < 0):
        raise Obstacle(f"mode={mode!r} with pads {pads} is not read")
    if mode == "constant":
        return call.ask(F.pad, call.source(), flat, "constant", value)
    flat += [0] * (2 * (rank - 2) - len(flat))
    return call.ask(F.pad, call.source(), flat, names[mode])


FUNCTION_READERS: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(_ARITHMETIC, _arithmetic), **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduce), "Cast": _cast, "Concat": _concat, "Dropout": _same, "Flatten": _flatten,
    "Gather": _gather, "Identity": _same, "LogSoftmax": _softmax, "Pad": _pad, "Reciprocal": _reciprocal,
    "Reshape": _reshape, "Resize": resize, "Slice": _slice, "Softmax": _softmax, "Split": _split, "Squeeze": _squeeze,
    "Transpose": _transpose, "Unsqueeze": _unsqueeze, "Upsample": resize,
}  # fmt: skip
