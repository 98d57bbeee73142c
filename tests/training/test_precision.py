"""Precision: what computes in bfloat16, and what does not."""

from typing import Any

import pytest
import torch
from torch import nn

from rmprune.measure.machine import BFLOAT16, has_instruction
from rmprune.training.precision import autocast, compute_dtype


def test_precision():
    cpu = torch.device("cpu")
    assert compute_dtype("float32", cpu) == torch.float32 and compute_dtype("bfloat16", cpu) == torch.bfloat16
    assert compute_dtype("auto", cpu) == (torch.bfloat16 if has_instruction(*BFLOAT16) else torch.float32)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups", "wide"),
    [
        (3, 2, 1, 8, True),
        (5, 1, 1, 8, True),
        ((1, 7), 1, 1, 8, True),
        (3, 1, 2, 8, True),
        (3, 1, 1, 8, False),
        (5, 1, 1, 1, False),
    ],
)
def test_on_a_cpu_autocast_trains_depthwise_layers_without_a_fast_gradient_in_float32(
    kernel: Any, stride: int, dilation: int, groups: int, wide: bool
) -> None:
    """oneDNN's bfloat16 gradient of these is several times slower; every other layer computes in bfloat16."""
    x = torch.randn(2, 8, 13, 13)
    layer = nn.Conv2d(8, 8, kernel, stride, dilation=dilation, groups=groups, bias=False)
    with autocast("bfloat16", torch.device("cpu")):
        output = layer(x)
        with torch.no_grad():
            assert layer(x).dtype == torch.bfloat16
    exact = torch.equal(output, layer(x).to(torch.bfloat16))
    assert output.dtype == torch.bfloat16 and exact == wide
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
