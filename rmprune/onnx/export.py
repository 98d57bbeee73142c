"""ONNX files and folded networks: batch norms go into the layer before, then the exporter runs and ONNX Runtime
checks it. No timing here.
"""

import inspect
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rmprune.errors import NotEquivalent, UnsupportedModel
from rmprune.graph.fold import fold_batch_norms
from rmprune.graph.inputs import Inputs, as_tuple
from rmprune.onnx import bare
from rmprune.onnx.bare import bare_graph, quiet_export, write_proto
from rmprune.onnx.compare import as_tensors, difference, is_off, named_outputs, open_session, outputs_of
from rmprune.runs.writing import whole

OPSET = 17
T = TypeVar("T")


def export_onnx(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> float:
    """Writes `model` (eval mode, batch norms folded, float32) as an ONNX file and returns its error against PyTorch in
    ONNX Runtime.

    `example_inputs`: (N, C, H, W), or a tuple or dict of inputs. Names: "input" and "output"; where there are several, those of
    forward's arguments, the keys of a dict, and "output_0" and so on for a tuple. With `dynamic_batch` their first
    axis is "batch". The error is the largest |difference| over the largest |entry| of the same output, both in float32, for the given
    inputs and for normal ones. Over `tolerance`, and over what float32 itself does to the network (`rounding`; a thousand
    layers): NotEquivalent, and no file. The TorchScript-based exporter is used where torch has it (1,200 layers: 6 s; the
    newer one needs minutes).
    """
    path = Path(path)
    inputs = as_tuple(model, example_inputs)
    folded = fold_batch_norms(model, inputs).float().cpu().to(memory_format=torch.contiguous_format)
    if sum(t.nbytes for t in (*folded.parameters(), *folded.buffers())) > bare.EXTERNAL_OVER:
        return _export_large(folded, inputs, path, dynamic_batch, tolerance)
    data = onnx_bytes(folded, inputs, dynamic_batch=dynamic_batch)
    error = _checked(folded, open_session(data), inputs, path, tolerance)
    with whole(path) as work:
        work.write_bytes(data)
    _take_weights(path)
    return error


def _take_weights(path: Path) -> None:
    """What a larger network that stood here had beside it."""
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def _export_large(
    folded: nn.Module, inputs: tuple[Tensor, ...], path: Path, dynamic_batch: bool, tolerance: float
) -> float:
    """The same with the weights in PATH.data beside it, where there are so many."""
    with whole(path.with_name(f"{path.name}.large")) as folder:
        folder.mkdir()
        work, heavy = folder / path.name, f"{path.name}.data"
        write_proto(*_asked(bare_graph, folded, inputs, dynamic_batch, OPSET), work)
        error = _checked(folded, open_session(work), inputs, path, tolerance)
        path.unlink(missing_ok=True)  # no old graph shows new weights: without a graph there is no file
        _take_weights(path)
        for file in sorted(folder.iterdir(), key=lambda file: file.name != heavy):  # the graph last
            file.replace(path.with_name(file.name))
    path.with_name(f"{path.name}.large").rmdir()
    return error


def onnx_bytes(folded: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], *, dynamic_batch: bool = True) -> bytes:
    """An eval-mode float32 CPU network as a serialised ONNX model (opset 17), without folding or checking."""
    return bytes(_asked(_with_weights, folded, example_inputs, dynamic_batch, OPSET))


def _with_weights(
    network: nn.Module, inputs: tuple[Tensor, ...], names: tuple[list[str], list[str]], axes: dict[str, Any], opset: int
) -> bytes:  # fmt: skip
    buffer = io.BytesIO()
    with quiet_export(), torch.inference_mode():
        torch.onnx.export(
            network,
            inputs,
            buffer,  # type: ignore[arg-type]  # a file object is documented, the annotation forgets it
            dynamo=False,
            opset_version=opset,
            input_names=names[0],
            output_names=names[1],
            dynamic_axes=axes,
        )
    return buffer.getvalue()


def _asked(
    export: Callable[..., T], folded: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], dynamic_batch: bool, opset: int
) -> T:  # fmt: skip
    """What `export` makes of the network, its inputs, and the names and open sizes that they and its outputs get."""
    inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in as_tensors(example_inputs))
    with torch.inference_mode():
        expected = folded(*inputs)
    outputs = named_outputs(expected)
    names = input_names(folded, len(inputs))
    outputs = {f"{name}_out" if name in names else name: value for name, value in outputs.items()}
    batched = {name: {0: "batch"} for name in names} | {
        name: {0: "batch"} for name, value in outputs.items() if value.dim() and len(value) == len(inputs[0])
    }
    network = folded if isinstance(expected, Tensor) else _Flat(folded)
    try:
        return export(network, inputs, (names, list(outputs)), batched if dynamic_batch else {}, opset)
    except Exception as error:  # the exporter has no error family of its own
        raise UnsupportedModel(
            f"torch.onnx cannot export the network ({type(error).__name__}: {str(error)[:200]})"
        ) from error


class _Flat(nn.Module):
    """A network that returns the tensors of its outputs in order, for an exporter that knows tuples only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(named_outputs(self.network(*inputs)).values())


def input_names(model: nn.Module, count: int) -> list[str]:
    """The names of a network's inputs in an ONNX file: "input", or forward's own where there are several."""
    return ["input"] if count == 1 else list(inspect.signature(model.forward).parameters)[:count]


def _batches(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """What files are compared on: the given inputs, and normal ones."""
    given, generator = as_tensors(inputs), torch.Generator().manual_seed(0)
    return [given, tuple(torch.randn(x.shape, generator=generator) if x.is_floating_point() else x for x in given)]


def _checked(folded: nn.Module, session: Any, inputs: tuple[Tensor, ...], path: Path, tolerance: float) -> float:
    """The largest `difference` of the file in ONNX Runtime to the network. Raises NotEquivalent as `export_onnx` says."""
    batches = _batches(inputs)
    errors = _onnx_errors(folded, session, batches)
    if any(is_off(own, tolerance, folded, batch) for own, batch in zip(errors, batches, strict=True)):
        raise NotEquivalent(
            f"{path}: ONNX Runtime differs from PyTorch by {max(errors):.1e} of the largest output (limit {tolerance:.1e}); "
            "no file written"
        )
    return float(torch.tensor(errors, dtype=torch.float64).max())  # NaN where one is


def _onnx_errors(folded: nn.Module, session: Any, batches: list[tuple[Tensor, ...]]) -> list[float]:
    """The `difference` of the file in ONNX Runtime to the network, batch by batch."""
    read = {value.name for value in session.get_inputs()}  # one that nothing depends on is left out
    names = input_names(folded, len(batches[0]))
    errors = []
    for batch in batches:
        expected = outputs_of(folded, batch)
        if not all(bool(value.isfinite().all()) for value in expected):
            raise NotEquivalent(
                "the network's outputs are not finite in float32 (an untrained deep network?), so its ONNX form cannot "
                "be checked; train it first, or leave ONNX out"
            )
        feed = {name: x.numpy() for name, x in zip(names, batch, strict=True) if name in read}
        errors.append(difference(map(torch.from_numpy, session.run(None, feed)), expected))
    return errors
