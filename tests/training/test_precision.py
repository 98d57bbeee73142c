"""Precision: what computes in bfloat16, and what does not."""

import torch
from torch import nn

from rmprune.measure.machine import BFLOAT16, has_instruction
from rmprune.training.precision import autocast, compute_dtype


def test_precision():
    cpu = torch.device("cpu")
    assert compute_dtype("float32", cpu) == torch.float32 and compute_dtype("bfloat16", cpu) == torch.bfloat16
    assert compute_dtype("auto", cpu) == (torch.bfloat16 if has_instruction(*BFLOAT16) else torch.float32)


def test_on_a_cpu_autocast_trains_strided_depthwise_layers_in_float32():
    """oneDNN's bfloat16 gradient of these is several times slower; every other layer computes in bfloat16."""
    x = torch.randn(2, 8, 9, 9)
    for stride, groups, wide in ((2, 8, True), (1, 8, False), (2, 1, False)):
        layer = nn.Conv2d(8, 8, 3, stride, 1, groups=groups, bias=False)
        with autocast("bfloat16", torch.device("cpu")):
            output = layer(x)
            with torch.no_grad():
                assert layer(x).dtype == torch.bfloat16
        exact = torch.equal(output, layer(x).to(torch.bfloat16))
        assert output.dtype == torch.bfloat16 and exact == wide
        output.float().sum().backward()
        assert layer.weight.grad.dtype == torch.float32
