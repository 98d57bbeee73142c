"""What comes out runs elsewhere: torch.export, TorchScript and ONNX Runtime, with stock operators."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from removal_nets import (
    Residual,
    conv_bn,
    images,
    prepared,
    small_resnet,
)
from torch import nn

from rmprune.onnx.export import onnx_bytes
from rmprune.removal import remove_residuals


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning", "ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("keep", [[], ["3"]], ids=["chain", "graph"])
def test_exports_agree(keep: list[str]) -> None:
    """torch.export, TorchScript and ONNX Runtime run what came out, with and without a block that stays."""
    model = small_resnet().float()
    x = images().float()
    result = remove_residuals(model, x, keep=keep).model
    expected = model(x)
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert torch.allclose(torch.export.export(result, (x,)).module()(x), expected, **close)
    assert torch.allclose(torch.jit.trace(result, x)(x), expected, **close)
    session = onnxruntime.InferenceSession(onnx_bytes(result, x), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, **close)


def test_onnx_of_an_inverted_residual_has_only_stock_operators() -> None:
    """Issue 3: no PRelu, Min, Max, Where or Slice; ONNX Runtime agrees."""
    block = nn.Sequential(*conv_bn(4, 8, 1), nn.ReLU6(), *conv_bn(8, 8, groups=8), nn.ReLU6(), *conv_bn(8, 4, 1))
    model = prepared(*conv_bn(3, 4), nn.ReLU6(), *conv_bn(4, 4, 1), Residual(block), Residual(block), gain=3.0).float()
    x = images().float()
    result = remove_residuals(model, x, batch_norm=False).model
    assert {type(module) for module in result} == {nn.Conv2d, nn.ReLU6}
    data = onnx_bytes(result, x)
    kinds = {node.op_type for node in onnx.load_from_string(data).graph.node}
    assert kinds <= {"Conv", "Clip", "Constant", "Identity"}
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(found - model(x).numpy()).max() <= 1e-4 * model(x).abs().max().item()


def test_mobilenet_becomes_version_one() -> None:
    """Issue 3: convolutions and stock ReLU6 only, and no PRelu, Min, Max, Where or Slice in its ONNX graph."""
    model = torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    removal = remove_residuals(model, x, fuse="always", batch_norm=False)
    kinds = [type(module) for module in removal.model]
    assert (
        set(kinds) == {nn.Conv2d, nn.ReLU6, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear} and len(removal.removed) == 11
    )
    assert all(a is not b or a is not nn.Conv2d for a, b in itertools.pairwise(kinds)), "two convolutions in a row"
    operators = {node.op_type for node in onnx.load_from_string(onnx_bytes(removal.model, x)).graph.node}
    assert operators - {"Identity"} == {"Conv", "Clip", "Constant", "GlobalAveragePool", "Flatten", "Gemm"}
    assert (removal.model(x) - model(x)).abs().max() <= 1e-4 * model(x).abs().max()
