"""ONNX files run in ONNX Runtime, and compared: a file with the network that was read from it, and with the file that was made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rmprune.errors import ArtifactError, NotEquivalent
from rmprune.graph.build import destination_of
from rmprune.onnx.compare import TOLERANCES, as_tensors, difference, in_format, is_off, outputs_of, runtime_says
from rmprune.onnx.file import OnnxFile, open_onnx
from rmprune.onnx.read import OnnxNetwork, fixed_batch, read_network


def checked_network(path: str | Path, image_size: int | None = None, channels: int = 3) -> OnnxNetwork:
    """The network of an ONNX file (`open_onnx`, `read_network`), compared with the file in ONNX Runtime.

    Raises NotEquivalent where their outputs differ by more than float32 rounds (both are computed in it): something was read wrongly.
    """
    network = read_network(open_onnx(path), image_size, channels)
    model, inputs = in_format(network.model, torch.float32), as_tensors(batch_for(network.file, network.examples))
    expected = run_file(network.file.in_float32, inputs)
    refuse_difference(model, inputs, outputs_of(model, inputs), expected, f"{path}: what was read of it")
    return network


def batch_for(file: OnnxFile, examples: Sequence[Tensor], seed: int = 0) -> tuple[Tensor, ...]:
    """Normal inputs of as many images as the file takes, two where it leaves that open, as its format holds them."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(entry.sizes[0] or fixed_batch(file) or 2, *x.shape[1:], generator=generator).to(file.dtype)
        for entry, x in zip(file.inputs, examples, strict=True)
    )


def run_file(file: OnnxFile, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a file in ONNX Runtime on the CPU. Raises ArtifactError where that refuses the file or the inputs."""
    feed = {entry.name: x.to(entry.dtype).numpy() for entry, x in zip(file.inputs, inputs, strict=True)}
    try:
        return [torch.from_numpy(value) for value in file.session.run([entry.name for entry in file.outputs], feed)]
    except Exception as error:  # ONNX Runtime has many errors of its own
        raise ArtifactError(
            f"{file.path}: ONNX Runtime refuses it ({runtime_says(error)}); export the network again"
        ) from None


def refuse_difference(
    model: nn.Module, inputs: tuple[Tensor, ...], found: list[Tensor], expected: list[Tensor], what: str
) -> float:
    """The `difference` of what was `found` for these inputs to what the file gives, whose network `model` is, in the format compared.

    Raises NotEquivalent where that is over the tolerance and over what the format itself does to the network, or an output is not finite.
    """
    if not all(bool(x.isfinite().all()) for x in expected):
        raise NotEquivalent(f"{what}: the file's outputs are not finite for normal inputs, so nothing can be compared")
    error, dtype = difference(found, expected), destination_of(model).dtype
    if is_off(error, TOLERANCES[dtype], model, inputs):
        todo = "give the file in float32" if dtype == torch.float16 else "it cannot be used"
        raise NotEquivalent(
            f"{what} differs from the file by {error:.1e} of the largest output in {str(dtype).removeprefix('torch.')}; {todo}"
        )
    return error
