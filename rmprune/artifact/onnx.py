"""ONNX files and folded networks: batch norms go into the layer before, then the exporter runs and ONNX Runtime
checks it. No timing here.
"""

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rmprune.errors import NotEquivalent, UnsupportedModel
from rmprune.graph.fold import fold_batch_norms
from rmprune.runs.writing import whole

OPSET = 17
ROUNDINGS = 4.0  # two float32 runs of one network differ by this many times its `rounding` at most


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> float:
    """Writes `model` (eval mode, batch norms folded, float32) as an ONNX file and returns its error against PyTorch in
    ONNX Runtime.

    `example_inputs`: (N, C, H, W). Input and output are named "input" and "output"; with `dynamic_batch` their first
    axis is "batch". The error is the largest |difference| over the largest |output|, both in float32, for the given
    inputs and for normal ones. Over `tolerance`, and over what float32 itself does to the network (`rounding`; a thousand
    layers): NotEquivalent, and no file. The TorchScript-based exporter is used where torch has it (1,200 layers: 6 s; the
    newer one needs minutes).
    """
    path = Path(path)
    folded = fold_batch_norms(model).float().cpu().to(memory_format=torch.contiguous_format)
    data = onnx_bytes(folded, example_inputs, dynamic_batch=dynamic_batch)
    x = example_inputs.detach().float().cpu()
    error = _onnx_error(folded, data, x)
    if not error <= tolerance and not (tolerance > 0 and error <= ROUNDINGS * rounding(folded, x)):
        raise NotEquivalent(
            f"{path}: ONNX Runtime differs from PyTorch by {error:.1e} of the largest output (limit {tolerance:.1e}); "
            "no file written"
        )
    with whole(path) as work:
        work.write_bytes(data)
    return error


def onnx_bytes(folded: nn.Module, example_inputs: Tensor, *, dynamic_batch: bool = True) -> bytes:
    """An eval-mode float32 CPU network as a serialised ONNX model (opset 17), without folding or checking."""
    x = example_inputs.detach().float().cpu().contiguous()
    axes = {"input": {0: "batch"}, "output": {0: "batch"}} if dynamic_batch else None
    buffer = io.BytesIO()
    with _quiet(), torch.inference_mode():
        try:
            torch.onnx.export(
                folded,
                (x,),
                buffer,  # type: ignore[arg-type]  # a file object is documented, the annotation forgets it
                dynamo=False,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                dynamic_axes=axes,
            )
        except Exception as error:  # the exporter has no error family of its own
            raise UnsupportedModel(
                f"torch.onnx cannot export the network ({type(error).__name__}: {str(error)[:200]})"
            ) from error
    return buffer.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns that it is the older one and logs; neither is for the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def rounding(model: nn.Module, x: Tensor) -> float:
    """What float32 does to the outputs of `model` in eval mode: largest |difference| to float64 over the largest |output|."""
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
        return float((model(x).double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def _onnx_error(folded: nn.Module, data: bytes, x: Tensor) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for batch in (x, noise):
        with torch.inference_mode():
            expected = folded(batch)
        if not isinstance(expected, Tensor):
            raise UnsupportedModel("only networks with one output tensor can be exported to ONNX")
        if not bool(expected.isfinite().all()):
            raise NotEquivalent(
                "the network's outputs are not finite in float32 (an untrained deep network?), so its ONNX form cannot "
                "be "
                "checked; train it first, or leave ONNX out"
            )
        actual = torch.from_numpy(session.run(None, {"input": batch.numpy()})[0])
        scale = expected.abs().max().clamp_min(1e-30)
        worst = max(worst, float((expected - actual).abs().max() / scale))
    return worst
