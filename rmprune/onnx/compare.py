"""Outputs compared, in ONNX Runtime and in PyTorch: the one rule by which two networks are the same. No files of others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from rmprune.graph.build import destination_of
from rmprune.graph.copied import copied
from rmprune.graph.run import on_copies
from rmprune.graph.tensors import to_double

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.float16: 2.0**-10}  # of the largest output
ROUNDINGS = 4.0  # two runs of one network in one format differ by this many times its `rounding` at most


def open_session(source: Path | bytes) -> Any:
    """An ONNX file, or one in memory, in ONNX Runtime on the CPU; what it warns of is not for the user."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
    )


def runtime_says(error: Exception) -> str:
    """What an error of a runtime says, in one line of bounded length, without ONNX Runtime's own marks and places in its code."""
    said = re.sub(
        r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .* failed:|\S*/onnxruntime/core/\S+ .*?\) (?=\w)",
        "",
        str(error),
    )
    return " ".join(said.split())[:200] or type(error).__name__


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """{name: tensor} of what a network returns: "output", or the keys of dicts and the places in tuples, joined by "_"."""
    found = {}
    for path, value in tree_flatten_with_path(outputs)[0]:
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        name = "_".join((["output"] if keys and keys[0].isdigit() else []) + keys) or "output"
        if isinstance(value, Tensor):
            found[name] = value
    return found


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors that a network returns, in order, without gradients."""
    with torch.inference_mode():
        return list(named_outputs(on_copies(model, *inputs)).values())


def as_tensors(inputs: Tensor | tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Inputs as a tuple on the CPU, those of floating point in this format."""
    values = (inputs,) if isinstance(inputs, Tensor) else inputs
    return tuple(x.detach().to("cpu", dtype) if x.is_floating_point() else x.cpu() for x in values)


def difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest |difference| over the largest |entry| of the same output, of several the worst; infinite where sizes differ."""
    found, expected = list(found), [x.double() for x in expected]
    if [x.shape for x in found] != [x.shape for x in expected]:
        return math.inf
    errors = (
        (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in zip(found, expected, strict=True)
    )
    return float(torch.stack(list(errors)).max())  # NaN where one is


def in_format(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network with its weights in this format: itself where they are."""
    return model if destination_of(model).dtype == dtype else copied(model).to(dtype)


def rounding(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> float:
    """What the format of its weights does to the outputs of `model` in eval mode: their `difference` to float64."""
    own = as_tensors(inputs, destination_of(model).dtype)
    return difference(outputs_of(model, own), outputs_of(copied(model).double(), tuple(map(to_double, own))))


def is_off(error: float, tolerance: float, model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a `difference` is over the tolerance and over what its format itself does to the network (not asked at tolerance 0)."""
    return not error <= tolerance and not (tolerance > 0 and error <= ROUNDINGS * rounding(model, inputs))
