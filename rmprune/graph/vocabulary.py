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
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth, stochastic_depth

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Deeper than 64, and recursion would end somewhere.
MODULE_PATH = re.compile(r"(?=.{1,500}\Z)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,63}")
MAX_CHANNELS = 2**24
MAX_EXTENT = 2**16
# Layers, tensors and nodes of a description; a thousand layers with all that belongs to them have 10,000.
MAX_ENTRIES = 50_000
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
        """The constructor arguments of `module`, as plain JSON values (tuples become lists, a parameter's presence a flag)."""
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
    extent, padding = _ints(1, length=(1, axes)), _ints(0, length=(1, axes))
    window: dict[str, Check] = {"kernel_size": extent, "stride": extent, "padding": padding, "dilation": extent}
    return window | {"return_indices": _one_of(False), "ceil_mode": _flag}


def _avg_pool(axes: int) -> dict[str, Check]:
    extent, padding = _ints(1, length=(1, axes)), _ints(0, length=(1, axes))
    window: dict[str, Check] = {"kernel_size": extent, "stride": extent, "padding": padding}
    last: dict[str, Check] = {"divisor_override": _ints(1, none=True)} if axes > 1 else {}
    return window | {"ceil_mode": _flag, "count_include_pad": _flag} | last


def _adaptive(axes: int) -> dict[str, Check]:
    return {"output_size": _ints(1, length=(axes,), none=True)}


def _pad(axes: int) -> dict[str, Check]:
    return {"padding": _ints(-MAX_EXTENT, length=(2 * axes,))}


def _of_ranks(kind: str, args: Callable[[int], dict[str, Check]]) -> list[LayerSpec]:
    """The layers of this kind for one, two and three axes, and what their arguments then are."""
    return [LayerSpec(getattr(nn, f"{kind}{axes}d"), args(axes)) for axes in (1, 2, 3)]


_attention: dict[str, Check] = {
    "embed_dim": _channels, "num_heads": _channels, "dropout": _real(0, 1), "bias": _flag, "add_zero_attn": _flag,
    "kdim": _channels, "vdim": _channels, "batch_first": _flag,
}  # fmt: skip
LAYERS: dict[str, LayerSpec] = {
    spec.cls.__name__: spec
    for spec in (
        *_of_ranks("Conv", _conv),
        *_of_ranks("ConvTranspose", partial(_conv, transposed=True)),
        LayerSpec(nn.Linear, {"in_features": _channels, "out_features": _channels, "bias": _flag}),
        *_of_ranks("BatchNorm", lambda _: _batch_norm),
        LayerSpec(nn.SyncBatchNorm, _batch_norm),
        *_of_ranks("InstanceNorm", lambda _: _batch_norm),
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
        *(LayerSpec(kind, {}) for kind in (nn.Identity, nn.Sigmoid, nn.Tanh, nn.Softsign)),
        *(
            LayerSpec(kind, _inplace)
            for kind in (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Mish, nn.SELU)
        ),
        LayerSpec(nn.Hardtanh, {"min_val": _real(), "max_val": _real(), "inplace": _flag}),
        LayerSpec(nn.GELU, {"approximate": _one_of("none", "tanh")}),
        LayerSpec(nn.Softplus, {"beta": _real(1e-6), "threshold": _real()}),
        LayerSpec(nn.ELU, {"alpha": _real(), "inplace": _flag}),
        LayerSpec(nn.CELU, {"alpha": _real(1e-6), "inplace": _flag}),
        LayerSpec(nn.LeakyReLU, {"negative_slope": _real(), "inplace": _flag}),
        LayerSpec(nn.PReLU, {"num_parameters": _channels}),
        LayerSpec(nn.Threshold, {"threshold": _real(), "value": _real(), "inplace": _flag}),
        *(LayerSpec(kind, _dim) for kind in (nn.Softmax, nn.LogSoftmax)),
        *_of_ranks("MaxPool", _max_pool),
        *_of_ranks("AvgPool", _avg_pool),
        *_of_ranks("AdaptiveAvgPool", _adaptive),
        *_of_ranks("AdaptiveMaxPool", lambda axes: _adaptive(axes) | {"return_indices": _one_of(False)}),
        *(spec for kind in ("Zero", "Reflection", "Replication", "Circular") for spec in _of_ranks(f"{kind}Pad", _pad)),
        *_of_ranks("ConstantPad", lambda axes: _pad(axes) | {"value": _real()}),
        LayerSpec(nn.Flatten, {"start_dim": _ints(-8, 8), "end_dim": _ints(-8, 8)}),
        LayerSpec(nn.Dropout, _dropout),
        *_of_ranks("Dropout", lambda _: _dropout),
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
    tanh softmax log_softmax square var flip roll movedim index_select unflatten swapaxes repeat_interleave addcmul addcdiv lerp
    multiply divide subtract rsub sin cos zeros ones full eye arange linspace
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
    addcmul addcmul_ addcdiv addcdiv_ lerp lerp_ multiply multiply_ divide divide_ subtract subtract_
    """)
)
TENSOR_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip
TENSOR_TYPES = {str(t).removeprefix("torch."): t for t in TENSOR_DTYPES}
FORMATS = {
    str(f).removeprefix("torch."): f for f in (torch.contiguous_format, torch.channels_last, torch.preserve_format)
}
