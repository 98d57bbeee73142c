"""Running the float64 copy of a network whose code names its own dtype: what it casts to float32 stays float64. Copies nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from rmprune.errors import UnsupportedModel
from rmprune.graph.run import on_copies

_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_PLAIN = (Tensor, int, float, str, type(None), torch.dtype)


class InDouble(TorchFunctionMode):
    """Every cast to float32 is one to float64, and so is every float32 tensor that the code makes or holds beside its buffers.

    Raises UnsupportedModel for a cast to half precision, which rounds: two networks that agree in float64 may differ by that rounding.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:  # its second argument is all that was copied before
            return func(*args, **(kwargs or {}))
        args, kwargs = each_argument(_widened, args, kwargs or {})
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args):
            func = Tensor.double if func is Tensor.float else func
            args, kwargs = each_argument(_wider, args, kwargs)
        found = func(*args, **kwargs)
        rounded = isinstance(found, Tensor) and found.is_floating_point() and found.dtype.itemsize < 4
        if rounded and any(isinstance(x, Tensor) for x in args):
            raise UnsupportedModel(
                f"the network computes in {str(found.dtype).removeprefix('torch.')} inside ({getattr(func, '__name__', func)}): that "
                "rounding is no part of a proof in float64; take the cast out, and cast the whole network afterwards"
            )
        return _widened(found)


def in_double(twin: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What the float64 copy of a network gives for these inputs, which stay as they are."""
    with InDouble():
        return on_copies(twin, *inputs)


def each_argument(
    change: Callable[[Any], Any], args: Any, kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`tree_map` of the arguments, at a tenth of its time: nearly all of them hold nothing, or only sizes."""

    def one(x: Any) -> Any:
        if isinstance(x, _PLAIN):
            return change(x)
        return x if type(x) is tuple and all(type(part) is int for part in x) else tree_map(change, x)

    return tuple(map(one, args)), {name: one(x) for name, x in kwargs.items()}


def _widened(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype == torch.float64 or not value.dtype.is_floating_point:
        return value.to(torch.complex128) if isinstance(value, Tensor) and value.dtype == torch.complex64 else value
    return value.double()


def _wider(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value
