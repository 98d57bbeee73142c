"""Which number format a device computes in fast; no model code."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rmprune.config import Precision
from rmprune.training.convolutions import TrainableConvolutions


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
    """A context that computes convolutions and matrix products in `compute_dtype`; on a CPU `TrainableConvolutions`."""
    with contextlib.ExitStack() as entered:
        if device.type == "cpu":
            entered.enter_context(TrainableConvolutions())
        if compute_dtype(precision, device) == torch.bfloat16:
            entered.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
        yield


def weights_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of a model's first weights in floating point; `default` where it has none."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), default)


def ask(model: nn.Module, x: Tensor) -> Tensor:
    """What a model makes of images [B, C, H, W], given to it in the dtype of its weights."""
    found: Tensor = model(x.to(weights_dtype(model, x.dtype)))
    return found
