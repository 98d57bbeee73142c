"""Convolutions whose gradients oneDNN computes wrongly or slowly on CPUs, computed another way while training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NARROW = 16  # channels: the widest block of oneDNN's kernels


class TrainableConvolutions(TorchFunctionMode):
    """Within it, torch.conv2d on the CPU has the same values, and gradients that can be relied on.

    1x1 kernels with a stride and few input channels: oneDNN writes past its workspace for the gradient of their weights in
    channels-last float32 without AVX-512 (https://github.com/uxlfoundation/oneDNN/issues/6035: wrong gradients, crashes, hangs).
    They see the pixels that they read, and have no stride.

    Depthwise ones under autocast, but those that look at 3x3 pixels or fewer, without a stride: there is no fast bfloat16 gradient for
    them, it takes 2 to 12 times what float32's takes, and most of an EfficientNet's step. They are computed in float32.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and torch.is_grad_enabled():
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | tuple[int, ...] = 1, padding: Any = 0,
    dilation: int | tuple[int, ...] = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    if input.device.type != "cpu" or input.dtype == torch.float64:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    strides, dilations = ((size, size) if isinstance(size, int) else tuple(size) for size in (stride, dilation))
    strided = max(strides) > 1
    if strided and weight.shape[2:] == (1, 1) and weight.shape[1] < NARROW and padding in (0, (0, 0), [0, 0], "valid"):
        return torch.conv2d(input[..., :: strides[0], :: strides[-1]], weight, bias, 1, 0, 1, groups)
    slow = strided or max(dilations) > 1 or max(weight.shape[2:]) > 3
    if slow and groups > 1 and weight.shape[1] == 1 and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return torch.conv2d(input.float(), weight, bias, stride, padding, dilation, groups).to(
                torch.get_autocast_dtype("cpu")
            )
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
