"""ONNX operators that move a window over a map: convolutions and pools, with every way to say their padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx, nn

from rmprune.graph.obstacle import Obstacle
from rmprune.onnx.drawing import Call, empty_layer, fill_layer, of_rank

LOWEST = float(np.finfo(np.float32).min)  # below every float32: what a maximum over a border reads
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ZEROS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_CONSTANTS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_GLOBAL = {
    "GlobalAveragePool": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    "GlobalMaxPool": (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
}


def _windows(call: Call, axes: int, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and dilations."""
    found = []
    for name in ("strides", "dilations"):
        value = call.attribute(name) or [1] * axes
        if len(value) != axes or min(value) < 1:
            raise Obstacle(f"its {name} are {value} with a kernel of {list(kernel)}")
        found.append(tuple(value))
    return found[0], found[1]


def _pads(call: Call, size: tuple[int, ...], kernel: Any, stride: Any, dilation: Any) -> tuple[list[int], list[int]]:
    """What is padded before and after on each axis, by `pads` or by `auto_pad`."""
    auto, given = call.attribute("auto_pad", b"NOTSET").decode(), call.attribute("pads") or [0] * (2 * len(kernel))
    if len(given) != 2 * len(kernel) or min(given) < 0:
        raise Obstacle(f"its pads are {given}")
    if auto == "NOTSET":
        return given[: len(kernel)], given[len(kernel) :]
    if auto == "VALID":
        return [0] * len(kernel), [0] * len(kernel)
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise Obstacle(f"auto_pad={auto!r} is not read")
    total = [
        max(0, (math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n)
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def _padded(call: Call, begin: list[int], end: list[int], value: float, most: Any) -> tuple[fx.Node, tuple[int, ...]]:
    """The input, padded by a layer where the pads differ or are over `most`, and the padding that is left to the next layer."""
    if begin == end and all(p <= m for p, m in zip(begin, most, strict=True)):
        return call.source(), tuple(begin)
    pads = tuple(p for pair in zip(reversed(begin), reversed(end), strict=True) for p in pair)  # the last axis first
    axes = len(begin)
    module = of_rank(_ZEROS, axes)(pads) if value == 0 else of_rank(_CONSTANTS, axes)(pads, value)
    return call.drawing.layer(f"{call.name}_pad", module, call.source()), (0,) * axes


def _kernel(call: Call, of_weight: tuple[int, ...] | None = None) -> tuple[int, ...]:
    kernel = tuple(call.attribute("kernel_shape") or of_weight or ())
    if not kernel or min(kernel) < 1 or (of_weight is not None and kernel != of_weight):
        raise Obstacle(
            f"its kernel_shape is {list(kernel)}" + (f", its weight's {list(of_weight)}" if of_weight else "")
        )
    return kernel


def _conv(call: Call) -> fx.Node:
    weight, bias = call.known(1, "weight"), call.known(2, "bias") if call.given(2) else None
    axes, groups = weight.ndim - 2, call.attribute("group", 1)
    kernel = _kernel(call, weight.shape[2:])
    stride, dilation = _windows(call, axes, kernel)
    if groups < 1 or weight.shape[0] % groups or weight.shape[1] * groups != call.shape()[1]:
        raise Obstacle(f"a weight of {list(weight.shape)} in {groups} groups does not fit {call.shape()[1]} channels")
    begin, end = _pads(call, call.shape()[2:], kernel, stride, dilation)
    source, padding = _padded(call, begin, end, 0.0, [math.inf] * axes)
    module = empty_layer(
        of_rank(_CONVS, axes), weight.shape[1] * groups, weight.shape[0], kernel, stride, padding, dilation, groups, bias is not None
    )  # fmt: skip
    return call.layer(fill_layer(module, weight=weight, bias=bias), source)


def _conv_transpose(call: Call) -> fx.Node:
    weight, bias = call.known(1, "weight"), call.known(2, "bias") if call.given(2) else None
    axes, groups = weight.ndim - 2, call.attribute("group", 1)
    kernel = _kernel(call, weight.shape[2:])
    stride, dilation = _windows(call, axes, kernel)
    call.only("output_shape", None, "write its pads and output_padding out")
    call.only("auto_pad", b"NOTSET", "write its pads out")
    begin, end = _pads(call, call.shape()[2:], kernel, stride, dilation)
    if begin != end:
        raise Obstacle(f"a transposed convolution with pads {begin + end}, which differ, is not read")
    more = call.attribute("output_padding") or [0] * axes
    module = empty_layer(
        of_rank(_TRANSPOSED, axes), weight.shape[0], weight.shape[1] * groups, kernel, stride, tuple(begin), tuple(more), groups,
        bias is not None, dilation,
    )  # fmt: skip
    return call.layer(fill_layer(module, weight=weight, bias=bias))


def _max_pool(call: Call) -> fx.Node:
    kernel = _kernel(call)
    stride, dilation = _windows(call, len(kernel), kernel)
    call.only("storage_order", 0)
    begin, end = _pads(call, call.shape()[2:], kernel, stride, dilation)
    source, padding = _padded(call, begin, end, LOWEST, [k // 2 for k in kernel])
    kind = of_rank(_MAX_POOLS, len(kernel))
    return call.layer(kind(kernel, stride, padding, dilation, ceil_mode=bool(call.attribute("ceil_mode", 0))), source)


def _average_pool(call: Call) -> fx.Node:
    kernel = _kernel(call)
    stride, dilation = _windows(call, len(kernel), kernel)
    if max(dilation) > 1:
        raise Obstacle(f"its dilations are {list(dilation)}; only 1 is read")
    begin, end = _pads(call, call.shape()[2:], kernel, stride, dilation)
    counts, ceil = bool(call.attribute("count_include_pad", 0)), bool(call.attribute("ceil_mode", 0))
    if ceil and counts and any(begin + end):
        raise Obstacle("ceil_mode=1 with count_include_pad=1 differs between runtimes and opsets; it is not read")
    most = [k // 2 for k in kernel]
    if not counts and (begin != end or any(p > m for p, m in zip(begin, most, strict=True))):
        raise Obstacle(
            f"an average that does not count its border (count_include_pad=0), with pads {begin + end}, is not read"
        )
    source, padding = _padded(call, begin, end, 0.0, most)
    kind = of_rank(_AVERAGES, len(kernel))
    return call.layer(kind(kernel, stride, padding, ceil_mode=ceil, count_include_pad=counts), source)


def _global_pool(call: Call) -> fx.Node:
    return call.layer(of_rank(_GLOBAL[call.op], len(call.shape()) - 2)(1))


WINDOW_READERS: dict[str, Callable[[Call], Any]] = {
    "AveragePool": _average_pool,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "MaxPool": _max_pool,
}
