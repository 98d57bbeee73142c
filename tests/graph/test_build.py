"""Modules from data: also where a kernel is run as sparse."""

import pytest
import torch
from conv_data import data, x_of
from removal_nets import conv

from rmprune.graph.build import build_conv, sparse_forward
from rmprune.graph.convolution import (
    Conv,
    Pattern,
)
from rmprune.removal.copies import Entries, Side, assemble
from rmprune.removal.geometry import Taps


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_sparse_runs_what_dense_would(stride: int, dilation: int) -> None:
    """Also where the kernel is not as sparse as promised."""
    layer = data(conv(40, 40, stride=stride, dilation=dilation, padding=dilation).double(), 40)
    index = torch.arange(40)
    copies = Entries(
        torch.cat([40 + index, 80 + index]),
        torch.cat([40 + index, 80 + index]),
        torch.ones(80, 1, 1, dtype=torch.float64),
    )
    side = Side(index, 120)
    wide = assemble(layer, side, side, 1, copies, Taps(torch.tensor([1]), torch.tensor([1]), False))
    assert isinstance(wide, Conv) and isinstance(wide.pattern, Pattern)
    module, x = build_conv(wide), x_of(120)
    assert (sparse_forward(module, x, wide.pattern) - module(x)).abs().max() < 1e-12
    module.weight[100, 3, 0, 0] = 5.0
    assert (sparse_forward(module, x, wide.pattern) - module(x)).abs().max() < 1e-12
