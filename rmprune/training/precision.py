"""Which number format a device computes in fast; no model code."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from rmprune.config import Precision
from rmprune.graph.tf32 import tf32
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
    """A context that computes convolutions and matrix products in `compute_dtype`, float32 unrounded; on a CPU `TrainableConvolutions`."""
    with contextlib.ExitStack() as entered:
        entered.enter_context(TrainableConvolutions() if device.type == "cpu" else tf32(False))
        if compute_dtype(precision, device) == torch.bfloat16:
            entered.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
        yield
