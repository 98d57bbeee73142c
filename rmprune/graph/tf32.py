"""How a GPU multiplies float32: as it is, or rounded. No tensors here."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 convolutions and matrix products on a GPU may round their factors to TF32's 10 bits; put back after."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
