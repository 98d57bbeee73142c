"""Stock modules for functional calls and tensor methods (F.relu -> nn.ReLU, x.mean([2, 3]) -> pool and flatten); nothing else."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmprune.graph.calls import DIVISIONS, DROPOUT_CALLS, MULTIPLICATIONS, TORCH_DROPOUT_CALLS, is_size, own_size
from rmprune.graph.convolution import Scale

Constant = Callable[[Any], Any]  # an fx argument -> the tensor behind a get_attr node, or the value itself
Shape = Callable[[fx.Node], tuple[int, ...] | None]  # of what a node gives; None where that is not known
NORMS: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
}  # fmt: skip
"""{dimensions of a batch: the batch norm that takes it}."""


def modules_for(node: fx.Node, constant: Constant, shape: Shape) -> list[nn.Module] | None:
    """The stock modules that do what this call does to its first argument; None where there are none."""
    entry = _CALLS.get(node.target)
    if entry is None or not node.args or not isinstance(node.args[0], fx.Node) or is_size(node.args[0]):
        return None
    names, build = entry
    if not node.kwargs.keys() <= set(names):  # dtype=, out=: what no stock module does
        return None
    values = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    given = {key: constant(value) for key, value in values.items()}
    if any(isinstance(value, fx.Node) for value in given.values()) and build is not _view:
        return None
    try:
        if build in _WITH_SHAPE:
            return build(given, shape(node.args[0]))
        return build(given, node) if build in _WITH_NODE else build(given)
    except (TypeError, KeyError, ValueError, AssertionError):
        return None  # called in a way that no stock module covers: left as it is


def _simple(make: Callable[..., nn.Module]) -> Callable[[dict[str, Any]], list[nn.Module]]:
    """`make(**values)`; in-place becomes out of place."""

    def build(given: dict[str, Any]) -> list[nn.Module]:
        return [make(**{k: v for k, v in given.items() if k not in ("inplace", "training")})]

    return build


def _contiguous(given: dict[str, Any], node: fx.Node) -> list[nn.Module] | None:
    """Another memory format changes no value; a reader such as `view` may depend on it, layers do not."""
    return [] if all(user.op == "call_module" for user in node.users) else None


def linear_pool(module: nn.MaxPool2d) -> nn.Module:
    """The largest of one pixel each is their average: a stride alone, as some shortcuts have it. Other pools as they are."""
    alone = (module.kernel_size, module.padding) in ((1, 0), ((1, 1), 0), ((1, 1), (0, 0)), (1, (0, 0)))
    return nn.AvgPool2d(1, module.stride) if alone and not module.ceil_mode and not module.return_indices else module


def _clamp(given: dict[str, Any]) -> list[nn.Module] | None:
    low, high = given.get("min"), given.get("max")
    if isinstance(low, int | float) and isinstance(high, int | float) and low < high:
        return [nn.Hardtanh(low, high)]
    return [nn.ReLU()] if low == 0 and high is None else None


def _holding(module: nn.Module, **tensors: Tensor | None) -> list[nn.Module]:
    """The module with copies of these tensors as its parameters."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(module, name, nn.Parameter(tensor.detach().clone()))
    return [module]


def _prelu(given: dict[str, Any]) -> list[nn.Module]:
    return _holding(nn.PReLU(given["weight"].numel()), weight=given["weight"].flatten())


def _mean(given: dict[str, Any], shape: tuple[int, ...] | None) -> list[nn.Module] | None:
    dims = given.get("dim")
    maps = shape is None or len(shape) == 4
    if not maps or not isinstance(dims, list | tuple) or sorted(dims) not in ([2, 3], [-2, -1]):
        return None
    return [nn.AdaptiveAvgPool2d(1)] + ([] if given.get("keepdim") else [nn.Flatten(1)])


def _view(given: dict[str, Any], node: fx.Node) -> list[nn.Module] | None:
    """x.view(x.size(0), -1) and its kin."""
    shape = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
    own = len(shape) == 2 and shape[1] == -1 and own_size(shape[0]) == (node.args[0], 0)
    return [nn.Flatten(1)] if own else None


def _scale(given: dict[str, Any], shape: tuple[int, ...] | None = None) -> list[nn.Module] | None:
    factor = given["other"]
    if isinstance(factor, int | float):
        return [Scale(torch.tensor([float(factor)], dtype=torch.float64))]
    if not isinstance(factor, Tensor):
        return None
    one = factor.numel() == 1 and factor.dim() <= (4 if shape is None else len(shape))
    channels = factor.dim() in (3, 4) and factor.shape[-2:] == (1, 1) and factor.shape[-3] == factor.numel()
    channels = channels and (shape is None or (len(shape) == 4 and shape[1] == factor.numel()))
    return [Scale(factor)] if one or channels else None


def _divide(given: dict[str, Any], shape: tuple[int, ...] | None) -> list[nn.Module] | None:
    divisor = given["other"]
    if not isinstance(divisor, int | float | Tensor):
        return None
    inverse = torch.as_tensor(divisor, dtype=torch.float64).detach().reciprocal()
    if isinstance(divisor, nn.Parameter):  # goes on being trained
        inverse = nn.Parameter(inverse, requires_grad=divisor.requires_grad)
    return _scale({"other": inverse}, shape)


def _conv2d(given: dict[str, Any]) -> list[nn.Module]:
    weight, bias = given["weight"], given.get("bias")
    groups = given.get("groups", 1)
    module = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), given.get("stride", 1), given.get("padding", 0),
        given.get("dilation", 1), groups, bias is not None,
    )  # fmt: skip
    return _holding(module, weight=weight, bias=bias)


def _linear(given: dict[str, Any]) -> list[nn.Module]:
    weight, bias = given["weight"], given.get("bias")
    return _holding(nn.Linear(weight.shape[1], weight.shape[0], bias is not None), weight=weight, bias=bias)


def _batch_norm(given: dict[str, Any], shape: tuple[int, ...] | None) -> list[nn.Module] | None:
    if given.get("training") or given.get("running_mean") is None:
        return None
    module = NORMS[4 if shape is None else len(shape)](len(given["running_mean"]), eps=given.get("eps", 1e-5))
    module.running_mean = given["running_mean"].detach().clone()
    module.running_var = given["running_var"].detach().clone()
    return _holding(module, weight=given.get("weight"), bias=given.get("bias"))


_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_ACTIVATIONS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.ReLU: (F.relu, torch.relu, torch.relu_, "relu", "relu_"),
    nn.ReLU6: (F.relu6,),
    nn.Sigmoid: (F.sigmoid, torch.sigmoid, "sigmoid"),
    nn.Tanh: (F.tanh, torch.tanh, "tanh"),
    nn.Hardswish: (F.hardswish,),
    nn.Hardsigmoid: (F.hardsigmoid,),
    nn.SiLU: (F.silu,),
    nn.Mish: (F.mish,),
}
_CALLS: dict[Any, tuple[tuple[str, ...], Callable[..., list[nn.Module] | None]]] = {
    **{call: (("inplace",), _simple(kind)) for kind, calls in _ACTIVATIONS.items() for call in calls},
    F.hardtanh: (("min_val", "max_val", "inplace"), _simple(nn.Hardtanh)),
    F.leaky_relu: (("negative_slope", "inplace"), _simple(nn.LeakyReLU)),
    F.gelu: (("approximate",), _simple(nn.GELU)),
    F.elu: (("alpha", "inplace"), _simple(nn.ELU)),
    F.softplus: (("beta", "threshold"), _simple(nn.Softplus)),
    **dict.fromkeys((F.prelu, torch.prelu, "prelu"), (("weight",), _prelu)),
    **dict.fromkeys((torch.clamp, "clamp", "clamp_"), (("min", "max"), _clamp)),
    F.avg_pool2d: (_POOL, _simple(nn.AvgPool2d)),
    **dict.fromkeys(
        (F.max_pool2d, torch.max_pool2d), (_MAX_POOL, _simple(lambda **given: linear_pool(nn.MaxPool2d(**given))))
    ),
    F.adaptive_avg_pool2d: (("output_size",), _simple(nn.AdaptiveAvgPool2d)),
    **dict.fromkeys((torch.mean, "mean"), (("dim", "keepdim"), _mean)),
    **dict.fromkeys(
        (torch.flatten, "flatten"), (("start_dim", "end_dim"), lambda given: [nn.Flatten(**{"start_dim": 0} | given)])
    ),
    **dict.fromkeys(("view", "reshape"), ((), _view)),
    **dict.fromkeys(
        DROPOUT_CALLS,
        (("p", "training", "inplace"), lambda given: None if given.get("training") else []),
    ),
    **dict.fromkeys(TORCH_DROPOUT_CALLS, (("p", "train"), lambda given: None if given.get("train", True) else [])),
    F.conv2d: (("weight", "bias", "stride", "padding", "dilation", "groups"), _conv2d),
    F.linear: (("weight", "bias"), _linear),
    F.batch_norm: (("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), _batch_norm),
    **dict.fromkeys(MULTIPLICATIONS, (("other",), _scale)),
    **dict.fromkeys(DIVISIONS, (("other",), _divide)),
    "detach": ((), lambda _: []),
    **dict.fromkeys(("clone", torch.clone), (("memory_format",), lambda _: [])),
    **dict.fromkeys((operator.pos, torch.positive, "positive", torch.detach), ((), lambda _: [])),
    **dict.fromkeys(
        (operator.neg, torch.neg, torch.negative, "neg", "negative"), ((), lambda _: _scale({"other": -1}))
    ),
    "contiguous": (("memory_format",), _contiguous),
}
_WITH_NODE = (_view, _contiguous)
_WITH_SHAPE = (_mean, _scale, _divide, _batch_norm)
