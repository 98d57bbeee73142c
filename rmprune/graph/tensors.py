"""The tensors of a network, and those in a value that it takes or gives. Runs nothing."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value, however it is nested."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: parameter or buffer}, of one that has several names by the first."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module itself."""
    yield from model.named_parameters(recurse=False)
    yield from model.named_buffers(recurse=False)


def all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The parameters, then the buffers, of a module and of those in it."""
    return itertools.chain(model.parameters(), model.buffers())


def floating_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Those of floating point."""
    return (tensor for tensor in all_tensors(model) if tensor.is_floating_point())


def floating_dtype(model: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """That of its first tensor of floating point; `default` where there is none."""
    return next((tensor.dtype for tensor in floating_tensors(model)), default)


def device_of(model: nn.Module) -> torch.device:
    """Where a network computes: the device of its first parameter or buffer."""
    return next((tensor.device for tensor in all_tensors(model)), torch.device("cpu"))


def to_double(x: Tensor) -> Tensor:
    """In float64 where it is of floating point, on the CPU."""
    return x.detach().cpu().double() if x.is_floating_point() else x.cpu()
