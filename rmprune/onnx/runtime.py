"""ONNX files run in ONNX Runtime, and compared: a file with the network that was read from it, and with the file that was made of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rmprune.errors import ArtifactError, NotEquivalent, first_line
from rmprune.onnx.compare import FLOAT32_TOLERANCE, difference, is_off, outputs_of
from rmprune.onnx.file import OnnxFile, open_onnx
from rmprune.onnx.read import OnnxNetwork, fixed_batch, read_network


def checked_network(path: str | Path, image_size: int | None = None, channels: int = 3) -> OnnxNetwork:
    """The network of an ONNX file (`open_onnx`, `read_network`), compared with the file in ONNX Runtime.

    Raises NotEquivalent where their outputs differ by more than float32 rounds: then something was read wrongly.
    """
    network = read_network(open_onnx(path), image_size, channels)
    inputs = batch_for(network.file, network.examples)
    refuse_difference(network, inputs, outputs_of(network.model, inputs), f"{path}: what was read of it")
    return network


def batch_for(file: OnnxFile, examples: Sequence[Tensor], seed: int = 0) -> tuple[Tensor, ...]:
    """Normal inputs of as many images as the file takes, two where it leaves that open."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(entry.sizes[0] or fixed_batch(file) or 2, *x.shape[1:], generator=generator)
        for entry, x in zip(file.inputs, examples, strict=True)
    )


def run_file(file: OnnxFile, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a file in ONNX Runtime on the CPU. Raises ArtifactError where that refuses the file or the inputs."""
    feed = {entry.name: x.numpy() for entry, x in zip(file.inputs, inputs, strict=True)}
    try:
        return [torch.from_numpy(value) for value in file.session.run([entry.name for entry in file.outputs], feed)]
    except Exception as error:  # ONNX Runtime has many errors of its own
        said = re.sub(
            r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .* failed:|\S*/onnxruntime/core/\S+ .*?\) (?=\w)",
            "",
            str(error),
        )
        raise ArtifactError(
            f"{file.path}: ONNX Runtime refuses it ({first_line(RuntimeError(said))}); export the network again"
        ) from None


def refuse_difference(network: OnnxNetwork, inputs: Sequence[Tensor], found: list[Tensor], what: str) -> float:
    """The `difference` of what was `found` for these inputs to the outputs of the file.

    Raises NotEquivalent where that is over FLOAT32_TOLERANCE and over what float32 itself does to the network, or an output is not finite.
    """
    expected = run_file(network.file, inputs)
    if not all(bool(x.isfinite().all()) for x in expected):
        raise NotEquivalent(
            f"{network.file.path}: its outputs are not finite for normal inputs, so nothing can be compared"
        )
    error = difference(found, expected)
    if is_off(error, FLOAT32_TOLERANCE, network.model, tuple(inputs)):
        raise NotEquivalent(
            f"{what} differs from the file by {error:.1e} of the largest output in ONNX Runtime; it cannot be used"
        )
    return error
