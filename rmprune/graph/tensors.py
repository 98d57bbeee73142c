"""The tensors of a network, and those in a value that it takes or gives. Runs nothing."""

import dataclasses
import enum
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rmprune.errors import UnsupportedModel

_PLAIN = int | float | complex | str | bytes | enum.Enum | torch.dtype | torch.device | None


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value, however it is nested."""
    return [x for x in _leaves(value) if isinstance(x, Tensor)]


def output_tensors(value: Any) -> list[Tensor]:
    """`tensors_in` what a network returns. Raises UnsupportedModel where it has none, or holds something that may hide some."""
    odd = next((x for x in _leaves(value) if not isinstance(x, Tensor | _PLAIN)), None)
    found = tensors_in(value)
    if odd is None and found:
        return found
    what = "no tensor" if odd is None else f"a {type(odd).__name__}, in which no tensors are looked for"
    raise UnsupportedModel(
        f"the network returns {what}: let forward return tensors, alone or in tuples, lists, dicts and dataclasses"
    )


def _leaves(value: Any) -> Iterator[Any]:
    """What is in a value; also where torch knows nothing of its type."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Mapping):
            parts: Any = leaf.values()
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            parts = (getattr(leaf, field.name, None) for field in dataclasses.fields(leaf))
        elif isinstance(leaf, tuple | list | set | frozenset):
            parts = leaf
        else:
            yield leaf
            continue
        for part in parts:
            yield from _leaves(part)


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
    """In float64 (complex128) where it is of floating point (complex), on the CPU."""
    x = x.detach().cpu()
    return x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x
