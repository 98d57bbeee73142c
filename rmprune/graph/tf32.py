"""How a GPU multiplies float32: as it is, or rounded. No tensors here."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# Where torch keeps it, and how it says yes and no: until 2.8, from 2.9 on.
_PLACES: tuple[tuple[Any, str, Any, Any], ...] = (
    (torch.backends.cudnn, "allow_tf32", True, False),
    (torch.backends.cuda.matmul, "allow_tf32", True, False),
    (getattr(torch.backends.cudnn, "conv", None), "fp32_precision", "tf32", "ieee"),
    (torch.backends.cuda.matmul, "fp32_precision", "tf32", "ieee"),
)


@contextlib.contextmanager
def tf32(allowed: bool, device: torch.device | str) -> Iterator[None]:
    """Whether float32 convolutions and matrix products on a GPU may round their factors to TF32's 10 bits; put back after.

    Nothing on another device. Convolutions are rounded unless a program says otherwise, so whatever compares, fits or scores networks
    stands under `@tf32(False, "cuda")` where it is called from outside.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    places = _PLACES[:2]
    try:
        before = [getattr(where, name) for where, name, _, _ in places]
    except RuntimeError:  # once a program has set the newer ones, torch does not let the older ones be read
        places = _PLACES[2:]
        before = [getattr(where, name) for where, name, _, _ in places]
    try:
        for where, name, yes, no in places:
            setattr(where, name, yes if allowed else no)
        yield
    finally:
        for (where, name, _, _), value in zip(places, before, strict=True):
            setattr(where, name, value)
