"""The arguments of a graph's nodes as JSON, there and back: plain values as they are, all else as an object of one key."""

import math
from typing import Any

import torch
from torch import fx

from rmprune.errors import ArtifactError
from rmprune.graph.vocabulary import FORMATS, TENSOR_DTYPES, TENSOR_TYPES


def encode(value: Any, where: str) -> Any:
    """A graph argument as JSON. Raises TypeError, which names the node (`where`), for what has no place in an artifact."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [encode(v, where) for v in value]}
    if isinstance(value, list):
        return [encode(v, where) for v in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, encode(v, where)] for key, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v, where) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype) and value in TENSOR_DTYPES:
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format) and value in FORMATS.values():
        return {"memory_format": str(value).removeprefix("torch.")}
    raise TypeError(f"{where}: an argument of type {type(value).__name__} has no place in an artifact")


def _are_pairs(inner: Any) -> bool:
    """A dict as a list of [name, value]."""
    pairs = inner if isinstance(inner, list) else [None]
    return all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)


def decode(value: Any, nodes: dict[str, fx.Node], where: str) -> Any:
    """The inverse of `encode`; a reference to a node that does not stand earlier raises ArtifactError."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [decode(v, nodes, where) for v in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, inner),) = value.items()
        if kind == "node" and isinstance(inner, str):
            if inner not in nodes:
                raise ArtifactError(
                    f"{where}: refers to {inner!r}, which is not an earlier node; write the artifact again"
                )
            return nodes[inner]
        if kind == "tuple" and isinstance(inner, list):
            return tuple(decode(v, nodes, where) for v in inner)
        if kind == "dict" and _are_pairs(inner):
            return {key: decode(v, nodes, where) for key, v in inner}
        if kind == "slice" and isinstance(inner, list) and len(inner) == 3:
            return slice(*(decode(v, nodes, where) for v in inner))
        if kind == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if kind == "ellipsis":
            return Ellipsis
        if kind == "dtype" and isinstance(inner, str) and inner in TENSOR_TYPES:
            return TENSOR_TYPES[inner]
        if kind == "memory_format" and isinstance(inner, str) and inner in FORMATS:
            return FORMATS[inner]
    raise ArtifactError(f"{where}: {str(value)[:80]!r} is not an argument this version of rmprune can read")
