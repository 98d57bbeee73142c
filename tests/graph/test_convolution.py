"""Convolutions as data, each against the module it stands for."""

from dataclasses import replace

import pytest
import torch
from conv_data import data, run, x_of
from removal_nets import conv, conv_bn, prepared
from torch import nn

from rmprune.graph.convolution import (
    Scale,
    dense_weight,
    identity,
    norm_of,
    output_size,
    with_norm,
)


@pytest.mark.parametrize(
    "module",
    [
        conv(4, 6), conv(4, 6, 3, 2, groups=2), conv(4, 4, 5, dilation=2, padding="same"), conv(4, 8, 2, padding="valid"),
        conv(4, 4, 3, padding_mode="circular"), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AvgPool2d((1, 3), 1, divisor_override=2),
        nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), Scale(torch.tensor([0.3])), Scale(torch.rand(1, 4, 1, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_modules_as_data(module: nn.Module) -> None:
    module = prepared(module)[0] if not isinstance(module, nn.AvgPool2d | Scale) else module.double()
    layer, x = data(module, 4), x_of(4)
    assert (run(layer, x) - module(x)).abs().max() < 1e-13
    assert output_size(layer.geometry, (7, 7)) == tuple(module(x).shape[2:])


def test_a_folded_batch_norm() -> None:
    model = prepared(*conv_bn(3, 5, 3, 2))
    layer = with_norm(data(model[0], 3), norm_of(model[1]), "bn")
    assert (run(layer, x_of(3)) - model(x_of(3))).abs().max() < 1e-13


def test_dense_weight_and_identity() -> None:
    grouped = data(conv(6, 4, 3, groups=2).double(), 6)
    dense = replace(grouped, weight=lambda: dense_weight(grouped), groups=1)
    assert (run(dense, x_of(6)) - run(grouped, x_of(6))).abs().max() < 1e-13
    assert torch.equal(run(identity(6), x_of(6)), x_of(6))
