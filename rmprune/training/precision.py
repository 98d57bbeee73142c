"""Which number format a device computes in fast, and whether it repeats itself; no model code."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rmprune.config import Precision
from rmprune.errors import ConfigError, first_line
from rmprune.graph.run import on_copies
from rmprune.graph.tensors import floating_dtype
from rmprune.graph.tf32 import tf32
from rmprune.measure.machine import BFLOAT16, has_instruction
from rmprune.training.convolutions import TrainableConvolutions


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype that `precision` means on this device: bfloat16 or float32."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_instruction(*BFLOAT16)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


@contextlib.contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """A context that computes convolutions and matrix products in `compute_dtype`, float32 unrounded; on a CPU `TrainableConvolutions`."""
    with contextlib.ExitStack() as entered:
        entered.enter_context(TrainableConvolutions() if device.type == "cpu" else tf32(False, device))
        if compute_dtype(precision, device) == torch.bfloat16:
            entered.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
        yield


def ask(model: nn.Module, x: Tensor) -> Tensor:
    """What a model makes of images [B, C, H, W], given to it in the dtype of its weights."""
    found: Tensor = on_copies(model, x.to(floating_dtype(model, x.dtype)))
    return found


@contextlib.contextmanager
def repeatable(asked: bool, device: torch.device) -> Iterator[None]:
    """Where asked, a GPU takes only kernels that give the same result every time. Raises ConfigError where there is none for a layer."""
    before = torch.are_deterministic_algorithms_enabled()
    if asked and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS shares its memory as it comes
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ConfigError(f"{first_line(error)}; leave --deterministic out") from error
    finally:
        torch.use_deterministic_algorithms(before)
