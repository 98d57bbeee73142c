"""What operations and stock modules do to channels, by their names without underscores: relu_, F.relu and nn.ReLU are one. Follows none."""

import operator
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rmprune.graph.convolution import Scale
from rmprune.graph.network import Network


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _ranks(text: str) -> frozenset[str]:
    return frozenset(f"{name}{rank}d" for name in text.split() for rank in (1, 2, 3))


ELEMENTWISE = _ranks("dropout") | _names("""
    add sub rsub mul div truediv truedivide floordiv iadd isub imul itruediv ifloordiv ipow mod imod multiply subtract divide
    lerp addcmul addcdiv
    maximum minimum pow neg abs exp expm1 log log1p sqrt rsqrt square sign erf sin cos reciprocal clamp clip clampmin clampmax
    eq ne lt le gt ge relu relu6 hardtanh hardswish hardsigmoid leakyrelu prelu silu gelu elu selu celu mish sigmoid
    tanh softplus softsign logsigmoid threshold hardshrink
    softshrink tanhshrink dropout alphadropout stochasticdepth contiguous clone detach to float double half typeas zeroslike oneslike
    scale
""")
# Of one value: 0 stays 0.
LINEAR = _names("mul div truediv truedivide neg contiguous clone detach to float double typeas scale")
SPATIAL = _ranks("""
    maxpool avgpool lppool adaptiveavgpool adaptivemaxpool zeropad constantpad reflectionpad replicationpad circularpad
""") | _names("maxpool2dsame avgpool2dsame upsample interpolate instancenorm")  # of a batch, see `batched`
REDUCTIONS = _names("mean sum amax amin")
ALONG = _names("softmax logsoftmax softmin cumsum cumprod")  # one dimension, whose elements meet
MOVES = _names("""
    view reshape flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis chunk split tensorsplit narrow select getitem
    cat concat concatenate stack flip roll expand expandas viewas reshapeas repeat repeatinterleave indexselect squeeze unsqueeze unbind
    pixelshuffle pixelunshuffle channelshuffle getattr size dim ndimension numel nelement
""")
LIKE = _names("viewas reshapeas expandas")  # which read no more than the shape of what else they are given
INDEXING = _names("getitem indexselect repeatinterleave")  # whose tensors other than the first say which elements


def batched(name: str, rank: int) -> bool:
    """Whether a value of this rank is a batch for a spatial operation: avg_pool2d reads [N, C, H, W]; [C, H, W], too, is one example."""
    axes = re.search(r"(\d)d", name)
    return axes is None or rank == int(axes[1]) + 2


def operation(node: fx.Node, network: Network) -> str:
    """The name of an operation or module of torch without underscores, `add` for +, add_ and torch.add; "" for others."""
    if node.op == "call_method":
        return str(node.target).replace("_", "")
    if node.op == "call_module":
        layer = network.layer(node)
        stock = isinstance(layer, Scale) or type(layer).__module__.split(".")[0] in ("torch", "timm")
        return type(layer).__name__.lower() if stock else ""
    name = getattr(node.target, "__name__", "")
    stock = node.target is getattr or any(getattr(m, name, None) is node.target for m in (torch, F, operator))
    return name.replace("_", "") if stock or name == "stochastic_depth" else ""


def product(name: str, args: tuple[Any, ...], factors: list[Tensor]) -> tuple[list[str], str] | None:
    """A product of maps as einsum writes it, a letter for each dimension: (of each factor, of the result); None for any other call."""
    ranks = [x.dim() for x in factors]
    letters = "abcdefghijklm"
    if name in ("matmul", "bmm") and len(factors) == 2 and min(ranks) > 1:
        common = letters[: max(ranks) - 2]
        return [(common + ends)[-rank:] for ends, rank in zip(("xy", "yz"), ranks, strict=True)], common + "xz"
    if (
        name == "scaleddotproductattention"
        and len(factors) in (3, 4)
        and len(set(ranks[:3])) == 1
        and max(ranks) == ranks[0]
    ):
        common = letters[: ranks[0] - 2]  # the fourth is a mask
        return [
            (common + ends)[-rank:] for ends, rank in zip(("xy", "zy", "zv", "xz"), ranks, strict=False)
        ], common + "xv"
    if name == "einsum" and args and isinstance(args[0], str):
        terms, arrow, result = args[0].replace(" ", "").partition("->")
        found = terms.split(",")
        if arrow and [len(term) for term in found] == ranks and all(len(set(t)) == len(t) for t in (*found, result)):
            return found, result
    return None
