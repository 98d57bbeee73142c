"""Batch norms that see the images of all processes while training. Their modules stay what they are."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SIGNATURE = inspect.signature(F.batch_norm)


class SharedStatistics(TorchFunctionMode):
    """While entered, batch norms in training mode normalise with the mean and variance over all processes, and count them in their
    running statistics: what `nn.SyncBatchNorm` computes, on CPUs too and for any way to call a batch norm.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            call = _SIGNATURE.bind(*args, **(kwargs or {}))
            call.apply_defaults()
            if call.arguments["training"]:
                return _batch_norm(**call.arguments)
        return func(*args, **(kwargs or {}))


class _Sum(torch.autograd.Function):
    """The sum over all processes; each of them gets the gradients of all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    """(x - mean) / sqrt(variance + eps) * weight + bias, with both over [B, H, W] of all processes. x: [B, C, ...]."""
    x = input if input.dtype == torch.float64 else input.float()
    over = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    here = x.numel() // x.shape[1]
    sums = _Sum.apply(torch.cat([x.sum(over), x.new_tensor([here])]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    apart = x - mean.view(shape)
    variance = _Sum.apply(apart.square().sum(over)) / count  # not from the sum of squares, which cancels
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    out = apart * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    return out.to(input.dtype)
