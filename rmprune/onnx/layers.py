"""ONNX operators that are layers of torch without a window: norms, linear layers, activations. Every attribute is asked for."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from rmprune.graph.obstacle import Obstacle
from rmprune.onnx.drawing import IN_EVAL, Call, empty_layer, fill_layer, of_rank
from rmprune.onnx.windows import LOWEST

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _batch_norm(call: Call) -> fx.Node:
    scale, shift, mean, variance = (
        call.known(i, what) for i, what in enumerate(("scale", "bias", "mean", "variance"), 1)
    )
    call.only("training_mode", 0, IN_EVAL)
    if call.opset < 14 and call.outputs > 1:
        raise Obstacle(f"it gives statistics of the batch, as in training; {IN_EVAL}")
    call.only("spatial", 1)
    eps, momentum = call.attribute("epsilon", 1e-5), 1 - call.attribute("momentum", 0.9)
    kind = of_rank(_NORMS, max(1, len(call.shape()) - 2))
    module = empty_layer(kind, len(scale), eps, min(max(momentum, 0.0), 1.0))
    fill_layer(module, weight=scale, bias=shift, running_mean=mean, running_var=variance)
    module.num_batches_tracked = torch.tensor(0)
    return call.layer(module)


def _instance_norm(call: Call) -> fx.Node:
    scale, shift = call.known(1, "scale"), call.known(2, "bias")
    module = empty_layer(
        of_rank(_INSTANCE, len(call.shape()) - 2), len(scale), call.attribute("epsilon", 1e-5), affine=True
    )
    return call.layer(fill_layer(module, weight=scale, bias=shift))


def _group_norm(call: Call) -> fx.Node:
    if call.opset < 21:
        raise Obstacle(
            "before opset 21 its scale is of groups, which is not read; convert the file by onnx.version_converter"
        )
    scale, shift = call.known(1, "scale"), call.known(2, "bias")
    call.only("stash_type", 1)
    module = empty_layer(nn.GroupNorm, call.attribute("num_groups"), len(scale), call.attribute("epsilon", 1e-5))
    return call.layer(fill_layer(module, weight=scale, bias=shift))


def _layer_norm(call: Call) -> fx.Node:
    scale, shift = call.known(1, "scale"), call.known(2, "bias") if call.given(2) else None
    call.only("stash_type", 1)
    axis = call.attribute("axis", -1) % len(call.shape())
    if scale.shape != call.shape()[axis:]:
        raise Obstacle(f"its scale has sizes {list(scale.shape)}, its input {list(call.shape()[axis:])}")
    module = empty_layer(nn.LayerNorm, scale.shape, call.attribute("epsilon", 1e-5), bias=shift is not None)
    return call.layer(fill_layer(module, weight=scale, bias=shift))


def _gemm(call: Call) -> fx.Node:
    weight, bias = call.known(1, "weight"), call.known(2, "bias") if call.given(2) else None
    call.only("transA", 0)
    weight = weight if call.attribute("transB", 0) else weight.T
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    if len(call.shape()) != 2 or weight.ndim != 2 or (bias is not None and bias.size not in (1, len(weight))):
        raise Obstacle(
            f"it multiplies {list(call.shape())} by {list(weight.shape)}; read are vectors (N, C) and one weight"
        )
    if bias is not None:
        bias = np.broadcast_to(bias.reshape(-1), (len(weight),)) * np.float32(beta)
    module = empty_layer(nn.Linear, weight.shape[1], weight.shape[0], bias is not None)
    return call.layer(fill_layer(module, weight=weight if alpha == 1 else weight * np.float32(alpha), bias=bias))


def _matmul(call: Call) -> fx.Node:
    other = call.values[1] if call.given(1) else None
    if not isinstance(call.values[0], fx.Node) or isinstance(other, fx.Node) or call.known(1, "weight").ndim != 2:
        return call.ask(torch.matmul, call.source(0), call.source(1))
    weight = call.known(1, "weight").T
    return call.layer(fill_layer(empty_layer(nn.Linear, weight.shape[1], weight.shape[0], False), weight=weight))


def _clip(call: Call) -> fx.Node:
    if call.opset < 11:
        low, high = call.attribute("min", -math.inf), call.attribute("max", math.inf)
    else:
        ends = [call.known(i, "limit") if call.given(i) else None for i in (1, 2)]
        low, high = (
            end if value is None else float(value.reshape(-1)[0])
            for end, value in zip((-math.inf, math.inf), ends, strict=True)
        )
    below, above = low <= LOWEST, high >= -LOWEST
    if below and above:
        return call.source()
    if (low, high) == (0, 6):
        return call.layer(nn.ReLU6())
    if low == 0 and above:
        return call.layer(nn.ReLU())
    if not below and not above and low < high:
        return call.layer(nn.Hardtanh(low, high))
    return call.ask(torch.clamp, call.source(), None if below else low, None if above else high)


def _prelu(call: Call) -> fx.Node:
    slope, channels = call.known(1, "slope"), call.shape()[1]
    one_a_channel = slope.size == channels and slope.ndim == len(call.shape()) - 1 and slope.shape[0] == channels
    if slope.size != 1 and not one_a_channel:
        raise Obstacle(f"its slope has sizes {list(slope.shape)}; read is one number, or one a channel")
    return call.layer(fill_layer(empty_layer(nn.PReLU, slope.size), weight=slope.reshape(-1)))


def _hard_sigmoid(call: Call) -> fx.Node:
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if beta != 0.5:
        raise Obstacle(f"beta={beta} is not read, only 0.5")
    if np.float32(alpha) == np.float32(1 / 6):
        return call.layer(nn.Hardsigmoid())
    # That is clip(a x + 1/2) = relu6(6 a x + 3) / 6.
    return call.layer(nn.Hardsigmoid(), call.ask(operator.mul, call.source(), 6 * alpha))


def _selu(call: Call) -> fx.Node:
    for name, own in (("alpha", 1.6732632423543772), ("gamma", 1.0507009873554805)):
        if np.float32(call.attribute(name, own)) != np.float32(own):
            raise Obstacle(f"its {name} is not that of the paper")
    return call.layer(nn.SELU())


def _gelu(call: Call) -> fx.Node:
    return call.layer(nn.GELU(call.attribute("approximate", b"none").decode()))


def _pixel_shuffle(call: Call) -> fx.Node:
    call.attributes.setdefault("mode", b"DCR")
    call.only("mode", b"CRD")
    return call.layer(nn.PixelShuffle(call.attribute("blocksize")))


def _simple(make: Callable[[], nn.Module]) -> Callable[[Call], fx.Node]:
    return lambda call: call.layer(make())


def _with(make: Callable[[float], nn.Module], name: str, default: float) -> Callable[[Call], fx.Node]:
    return lambda call: call.layer(make(call.attribute(name, default)))


LAYER_READERS: dict[str, Callable[[Call], Any]] = {
    "BatchNormalization": _batch_norm, "Celu": _with(nn.CELU, "alpha", 1.0), "Clip": _clip,
    "DepthToSpace": _pixel_shuffle, "Elu": _with(nn.ELU, "alpha", 1.0), "Gelu": _gelu, "Gemm": _gemm,
    "GroupNormalization": _group_norm, "HardSigmoid": _hard_sigmoid, "HardSwish": _simple(nn.Hardswish),
    "InstanceNormalization": _instance_norm, "LayerNormalization": _layer_norm,
    "LeakyRelu": _with(nn.LeakyReLU, "alpha", 0.01), "MatMul": _matmul, "Mish": _simple(nn.Mish), "PRelu": _prelu,
    "Relu": _simple(nn.ReLU), "Selu": _selu, "Sigmoid": _simple(nn.Sigmoid),
    "Softplus": _simple(lambda: nn.Softplus(threshold=37)),  # beyond it the difference is below float64's rounding
    "Softsign": _simple(nn.Softsign), "Tanh": _simple(nn.Tanh),
    "ThresholdedRelu": _with(lambda alpha: nn.Threshold(alpha, 0.0), "alpha", 1.0),
}  # fmt: skip
