"""The closed list of layer types, functions and methods an artifact may name, with the range of every argument; it runs
no network.

A description comes from outside, so nothing in it is looked up by import path: a name is either in the tables below or
refused.
"""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth, stochastic_depth

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MODULE_PATH = re.compile(
    r"(?=.{1,500}\Z)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,63}"
)  # deeper, and recursion would end somewhere
MAX_CHANNELS = 2**24
MAX_EXTENT = 2**16
MAX_ENTRIES = (
    50_000  # layers, tensors and nodes of a description; a thousand layers with all that belongs to them have 10,000
)
Check = Callable[[Any], bool]


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _ints(low: int, high: int = MAX_EXTENT, length: tuple[int, ...] = (), none: bool = False) -> Check:
    """A whole number in this range, or a list of as many as `length` allows."""

    def check(value: Any) -> bool:
        if isinstance(value, list):
            return len(value) in length and all(_is_int(v, low, high) or (none and v is None) for v in value)
        return _is_int(value, low, high) or (none and value is None)

    return check


def _real(low: float = -math.inf, high: float = math.inf) -> Check:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _one_of(*choices: Any) -> Check:
    return lambda value: any(value is c or (type(value) is type(c) and value == c) for c in choices)


def _either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


_flag = _one_of(True, False)
_channels = _ints(1, MAX_CHANNELS)
_extent = _ints(1)
_scale = _either(
    _real(1e-6, MAX_EXTENT), _one_of(None), lambda v: isinstance(v, list) and all(map(_real(1e-6, MAX_EXTENT), v))
)


@dataclass(frozen=True)
class LayerSpec:
    """A layer type: its class and, for each constructor argument kept, the check that its value must pass.

    `added`: arguments kept since a later version; files from before it lack them, and the layer then has None. `inside`:
    modules in it whose tensors belong to it.
    """

    cls: type[nn.Module]
    args: dict[str, Check]
    added: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    def owns(self, tensor: str) -> bool:
        """Whether a tensor of this path in a module of the type belongs to it, and not to another module in it."""
        return "." not in tensor or tensor.partition(".")[0] in self.inside

    def read(self, module: nn.Module) -> dict[str, Any]:
        """The constructor arguments of `module`, as plain JSON values (tuples become lists, a parameter's presence a
        flag).
        """
        values = {name: getattr(module, name, None) for name in self.args}
        if "bias" in values:
            values["bias"] = any(getattr(module, name, None) is not None for name in ("bias", "in_proj_bias"))
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def make(self, values: dict[str, Any]) -> nn.Module:
        """A fresh layer; lists become tuples again. The caller has checked `values`."""
        return self.cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _conv(axes: int, transposed: bool = False) -> dict[str, Check]:
    extent, padding = _ints(1, length=(axes,)), _ints(0, length=(axes,))
    args = {
        "in_channels": _channels,
        "out_channels": _channels,
        "kernel_size": extent,
        "stride": extent,
        "padding": padding if transposed else _either(padding, _one_of("same", "valid")),
    }
    if transposed:
        args["output_padding"] = padding
    args |= {"dilation": extent, "groups": _channels, "bias": _flag}
    return args | {
        "padding_mode": _one_of("zeros") if transposed else _one_of("zeros", "reflect", "replicate", "circular")
    }


_batch_norm: dict[str, Check] = {
    "num_features": _channels,
    "eps": _real(0, 1e6),
    "momentum": _either(_one_of(None), _real(0, 1)),
    "affine": _flag,
    "track_running_stats": _flag,
}
_inplace: dict[str, Check] = {"inplace": _flag}
_dropout: dict[str, Check] = {"p": _real(0, 1), "inplace": _flag}
_dim: dict[str, Check] = {"dim": _either(_ints(-8, 8), _one_of(None))}


def _max_pool(axes: int) -> dict[str, Check]:
    extent = _ints(1, length=(1, axes))
    return {
        "kernel_size": extent,
        "stride": extent,
        "padding": _ints(0, length=(1, axes)),
        "dilation": extent,
        "return_indices": _one_of(False),
        "ceil_mode": _flag,
    }


def _avg_pool(axes: int) -> dict[str, Check]:
    extent = _ints(1, length=(1, axes))
    return {
        "kernel_size": extent,
        "stride": extent,
        "padding": _ints(0, length=(1, axes)),
        "ceil_mode": _flag,
        "count_include_pad": _flag,
    }


def _adaptive(axes: int) -> dict[str, Check]:
    return {"output_size": _ints(1, length=(axes,), none=True)}


def _pad(axes: int) -> dict[str, Check]:
    return {"padding": _ints(-MAX_EXTENT, length=(2 * axes,))}


_PADS = (
    (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)
_attention: dict[str, Check] = {
    "embed_dim": _channels,
    "num_heads": _channels,
    "dropout": _real(0, 1),
    "bias": _flag,
    "add_zero_attn": _flag,
    "kdim": _channels,
    "vdim": _channels,
    "batch_first": _flag,
}
LAYERS: dict[str, LayerSpec] = {
    spec.cls.__name__: spec
    for spec in (
        LayerSpec(nn.Conv1d, _conv(1)),
        LayerSpec(nn.Conv2d, _conv(2)),
        LayerSpec(nn.Conv3d, _conv(3)),
        LayerSpec(nn.ConvTranspose1d, _conv(1, transposed=True)),
        LayerSpec(nn.ConvTranspose2d, _conv(2, transposed=True)),
        LayerSpec(nn.ConvTranspose3d, _conv(3, transposed=True)),
        LayerSpec(nn.Linear, {"in_features": _channels, "out_features": _channels, "bias": _flag}),
        LayerSpec(nn.BatchNorm1d, _batch_norm),
        LayerSpec(nn.BatchNorm2d, _batch_norm),
        LayerSpec(nn.BatchNorm3d, _batch_norm),
        LayerSpec(nn.SyncBatchNorm, _batch_norm),
        *(LayerSpec(norm, _batch_norm) for norm in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
        LayerSpec(
            nn.GroupNorm, {"num_groups": _channels, "num_channels": _channels, "eps": _real(0, 1e6), "affine": _flag}
        ),
        LayerSpec(
            nn.LayerNorm,
            {
                "normalized_shape": _ints(1, MAX_CHANNELS, length=(1, 2, 3, 4)),
                "eps": _real(0, 1e6),
                "elementwise_affine": _flag,
                "bias": _flag,
            },
        ),
        LayerSpec(nn.ReLU, _inplace),
        LayerSpec(nn.ReLU6, _inplace),
        LayerSpec(nn.Hardtanh, {"min_val": _real(), "max_val": _real(), "inplace": _flag}),
        LayerSpec(nn.Hardswish, _inplace),
        LayerSpec(nn.Hardsigmoid, _inplace),
        LayerSpec(nn.SiLU, _inplace),
        LayerSpec(nn.Mish, _inplace),
        LayerSpec(nn.GELU, {"approximate": _one_of("none", "tanh")}),
        LayerSpec(nn.Sigmoid, {}),
        LayerSpec(nn.Tanh, {}),
        LayerSpec(nn.Softsign, {}),
        LayerSpec(nn.Softplus, {"beta": _real(1e-6), "threshold": _real()}),
        LayerSpec(nn.ELU, {"alpha": _real(), "inplace": _flag}),
        LayerSpec(nn.SELU, _inplace),
        LayerSpec(nn.CELU, {"alpha": _real(1e-6), "inplace": _flag}),
        LayerSpec(nn.LeakyReLU, {"negative_slope": _real(), "inplace": _flag}),
        LayerSpec(nn.PReLU, {"num_parameters": _channels}),
        LayerSpec(nn.Threshold, {"threshold": _real(), "value": _real(), "inplace": _flag}),
        LayerSpec(nn.Softmax, _dim),
        LayerSpec(nn.LogSoftmax, _dim),
        LayerSpec(nn.MaxPool1d, _max_pool(1)),
        LayerSpec(nn.MaxPool2d, _max_pool(2)),
        LayerSpec(nn.MaxPool3d, _max_pool(3)),
        LayerSpec(nn.AvgPool1d, _avg_pool(1)),
        LayerSpec(nn.AvgPool2d, _avg_pool(2) | {"divisor_override": _ints(1, none=True)}),
        LayerSpec(nn.AvgPool3d, _avg_pool(3) | {"divisor_override": _ints(1, none=True)}),
        LayerSpec(nn.AdaptiveAvgPool1d, _adaptive(1)),
        LayerSpec(nn.AdaptiveAvgPool2d, _adaptive(2)),
        LayerSpec(nn.AdaptiveAvgPool3d, _adaptive(3)),
        LayerSpec(nn.AdaptiveMaxPool1d, _adaptive(1) | {"return_indices": _one_of(False)}),
        LayerSpec(nn.AdaptiveMaxPool2d, _adaptive(2) | {"return_indices": _one_of(False)}),
        LayerSpec(nn.AdaptiveMaxPool3d, _adaptive(3) | {"return_indices": _one_of(False)}),
        *(LayerSpec(pad, _pad(axes)) for kind in _PADS for axes, pad in enumerate(kind, 1)),
        LayerSpec(nn.ConstantPad1d, _pad(1) | {"value": _real()}),
        LayerSpec(nn.ConstantPad2d, _pad(2) | {"value": _real()}),
        LayerSpec(nn.ConstantPad3d, _pad(3) | {"value": _real()}),
        LayerSpec(nn.Flatten, {"start_dim": _ints(-8, 8), "end_dim": _ints(-8, 8)}),
        LayerSpec(nn.Identity, {}),
        LayerSpec(nn.Dropout, _dropout),
        LayerSpec(nn.Dropout1d, _dropout),
        LayerSpec(nn.Dropout2d, _dropout),
        LayerSpec(nn.Dropout3d, _dropout),
        LayerSpec(nn.AlphaDropout, _dropout),
        LayerSpec(StochasticDepth, {"p": _real(0, 1), "mode": _one_of("batch", "row")}),
        LayerSpec(
            nn.Upsample,
            {
                "size": _ints(1, length=(1, 2, 3), none=True),
                "scale_factor": _scale,
                "mode": _one_of("nearest", "linear", "bilinear", "bicubic", "trilinear", "nearest-exact"),
                "align_corners": _one_of(None, True, False),
                "recompute_scale_factor": _one_of(None, True, False),
            },
            added=("recompute_scale_factor",),
        ),
        LayerSpec(nn.PixelShuffle, {"upscale_factor": _extent}),
        LayerSpec(nn.PixelUnshuffle, {"downscale_factor": _extent}),
        LayerSpec(nn.ChannelShuffle, {"groups": _channels}),
        LayerSpec(nn.MultiheadAttention, _attention, inside=("out_proj",)),
    )
}


def _words(text: str) -> list[str]:
    return text.split()


_OPERATOR_NAMES = _words("""
    add iadd sub isub mul imul truediv itruediv floordiv ifloordiv mod imod neg pow ipow matmul getitem eq ne lt le gt ge invert
""")
_TORCH_NAMES = _words("""
    add sub mul div true_divide neg pow exp erf log sqrt rsqrt abs maximum minimum clamp clip where matmul bmm einsum cat concat
    stack chunk split flatten reshape permute transpose squeeze unsqueeze mean sum amax amin max min relu relu_ sigmoid
    tanh softmax log_softmax square var flip roll movedim index_select unflatten swapaxes repeat_interleave addcmul sin cos
    zeros ones full eye arange linspace
""")
_FUNCTIONAL_NAMES = _words("""
    relu relu_ relu6 hardtanh hardtanh_ hardswish hardsigmoid silu mish gelu elu selu celu leaky_relu prelu sigmoid tanh
    softplus softmax log_softmax threshold max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d pad interpolate conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear
    batch_norm layer_norm group_norm instance_norm
    normalize dropout dropout2d pixel_shuffle pixel_unshuffle scaled_dot_product_attention unfold fold
""")
_MATH_NAMES = _words("ceil floor sqrt")  # of sizes
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR_NAMES},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH_NAMES},
    **{f"F.{name}": getattr(F, name) for name in _FUNCTIONAL_NAMES},
    **{f"math.{name}": getattr(math, name) for name in _MATH_NAMES},
    "getattr": getattr,  # of ATTRIBUTES only
    "stochastic_depth": stochastic_depth,
}
FUNCTION_NAMES: dict[Any, str] = {function: name for name, function in FUNCTIONS.items()}
# Functions whose `training` argument tracing freezes to what it was at that moment: allowed only where it was False.
TRAINING_FLAG = {F.dropout: 2, F.dropout2d: 2, F.batch_norm: 5, stochastic_depth: 3}
ATTRIBUTES = frozenset({"shape", "ndim", "T", "device", "dtype"})
TENSOR_METHODS = frozenset(
    _words("""
    view reshape flatten mean sum amax amin max min size dim numel relu relu_ sigmoid sigmoid_ tanh softmax log_softmax
    add add_ sub sub_ mul mul_ div div_ neg pow sqrt rsqrt abs exp log clamp clamp_ clip permute transpose contiguous
    squeeze unsqueeze chunk split expand expand_as view_as repeat matmul bmm flip roll square t narrow select unflatten
    unbind movedim index_select unfold repeat_interleave swapaxes to type float double type_as new_zeros new_ones sin cos reshape_as
    """)
)
TENSOR_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
TENSOR_TYPES = {str(t).removeprefix("torch."): t for t in TENSOR_DTYPES}
FORMATS = {
    str(f).removeprefix("torch."): f for f in (torch.contiguous_format, torch.channels_last, torch.preserve_format)
}
