"""Networks in int8: scales and zero points chosen from training images (static quantisation). Accuracy is accuracy.py's business."""

import importlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmprune.measure.candidate import Candidate, onnx_form
from rmprune.measure.machine import has_instruction
from rmprune.measure.runtimes import openvino_form, silence

CALIBRATION_BATCH = 16  # calibration images that pass at once


class _Reader:
    """Calibration batches as ONNX Runtime asks for them."""

    def __init__(self, candidate: Candidate) -> None:
        self._batches: Iterator[Any] = iter(candidate.calibration.split(CALIBRATION_BATCH))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch.numpy()}


def onnx_int8(candidate: Candidate) -> bytes:
    """The ONNX form in int8: QDQ, weights per output channel, activations per tensor between the least and greatest value seen.

    Activations are unsigned: from signed ones, its default, ONNX Runtime 1.32 on x86 leaves most convolutions of a residual network in
    float32 (three times as slow; a network without additions it takes whole), which no comparison survives.
    Seven bits of weights where the processor adds pairs of products in 16 bits (x86 without VNNI), which eight can overflow.
    """
    onnx = importlib.import_module("onnx")
    quantization = importlib.import_module("onnxruntime.quantization")
    preprocess = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    reader = _Reader(candidate)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises on the root logger
    try:
        with tempfile.TemporaryDirectory() as folder, silence():
            before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
            preprocess(onnx.load_from_string(candidate.form(onnx_form)), before, skip_symbolic_shape=True)
            quantization.quantize_static(
                before,
                after,
                reader,
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                reduce_range=has_instruction("avx2") and not has_instruction("avx512_vnni", "avx_vnni"),
            )
            return after.read_bytes()
    finally:
        root.setLevel(level)


def openvino_int8(candidate: Candidate) -> Any:
    """OpenVINO's network in int8 by NNCF's post-training quantisation: weights per channel, activations per tensor, biases corrected.

    Ranges are between the least and greatest value seen, as for ONNX Runtime. By itself NNCF takes the mean of the images' extremes and
    clips the rest: 12 points of a pruned ResNet-20's accuracy on the digits, which its residual network did not lose.
    """
    images = [image[None].numpy() for image in candidate.calibration]
    with silence():
        nncf = importlib.import_module("nncf")
        ranges = importlib.import_module("nncf.quantization.range_estimator").RangeEstimatorParametersSet.MINMAX
        # Its own function quietens the handlers that it shares with us.
        logging.getLogger("nncf").setLevel(logging.ERROR)
        return nncf.quantize(
            candidate.form(openvino_form).clone(),
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset.MIXED,  # unsigned where nothing is negative
            subset_size=len(images),
            advanced_parameters=nncf.AdvancedQuantizationParameters(activations_range_estimator_params=ranges),
        )
