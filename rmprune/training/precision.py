"""Which number format a device computes in fast; no model code."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rmprune.config import Precision


@functools.cache
def processor_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, ARM's BF16); False where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":", 1)[1].split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype that `precision` means on this device: bfloat16 or float32."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else processor_has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


@contextlib.contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """A context that computes convolutions and matrix products in `compute_dtype`."""
    if compute_dtype(precision, device) == torch.float32:
        yield
        return
    mode = _StridedDepthwiseInFloat32() if device.type == "cpu" else contextlib.nullcontext()
    with mode, torch.autocast(device.type, dtype=torch.bfloat16):
        yield


class _StridedDepthwiseInFloat32(TorchFunctionMode):
    """Under autocast on a CPU: depthwise convolutions with a stride are trained in float32.

    oneDNN has no fast bfloat16 gradient for them: it takes several times what float32's takes, and much of a MobileNetV2's step.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and torch.is_grad_enabled():
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: Any = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """torch.conv2d; in float32, and back, where it is depthwise with a stride."""
    strides = (stride,) if isinstance(stride, int) else stride
    if groups == 1 or weight.shape[1] > 1 or max(strides) == 1 or input.dtype == torch.float64:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    with torch.autocast("cpu", enabled=False):
        return torch.conv2d(input.float(), weight, bias, stride, padding, dilation, groups).to(torch.bfloat16)
