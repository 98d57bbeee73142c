"""The tensor maths beneath removal, each against the modules it stands for."""

from dataclasses import replace

import pytest
import torch
from removal_nets import conv, conv_bn, prepared
from torch import Tensor, nn

from rmprune.graph.build import build_conv, sparse_forward
from rmprune.graph.convolution import (
    Block,
    Conv,
    Scale,
    dense_weight,
    from_module,
    identity,
    norm_of,
    output_size,
    with_norm,
)
from rmprune.graph.fuse import compose
from rmprune.removal.copies import Entries, Side, assemble, entries_of, join
from rmprune.removal.geometry import Taps
from rmprune.removal.reserve import Wire, lay_out


def data(module: nn.Module, channels: int) -> Conv:
    found = from_module(module, channels)
    assert isinstance(found, Conv), found
    return found


def run(layer: Conv, x: Tensor) -> Tensor:
    return build_conv(layer.folded())(x)


def x_of(channels: int, size: int = 7) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


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


PAIRS = [
    (conv(4, 6), conv(6, 3, 1)),
    (conv(4, 6, 3, 2), conv(6, 3, 1, 2)),
    (conv(4, 6, groups=2), conv(6, 4, 1, groups=2)),
    (conv(4, 6, groups=2), conv(6, 4, 1)),
    (conv(4, 4, groups=4), conv(4, 6, 1)),
    (conv(4, 8, 1, groups=4), conv(8, 8, 1, groups=2)),
    (conv(4, 6, 1, bias=False), conv(6, 3, 3)),
    (conv(4, 6, 1), conv(6, 3, 3, padding=0)),
    (conv(4, 6, 1, 2), conv(6, 3, 3, padding=0)),
    (nn.AvgPool2d(2), conv(4, 3, 1)),
    (nn.BatchNorm2d(4), conv(4, 3, 3, padding=0)),
    (conv(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    (conv(4, 4, 1), conv(4, 4, 3, groups=4, padding=0)),
    (conv(4, 4, 3, 2, groups=4), conv(4, 6, 1, groups=2)),
    (conv(4, 4, 1, groups=4), conv(4, 6, 3, groups=2, padding=0)),
    (conv(4, 8, 1, groups=2), conv(8, 8, 3, groups=8, padding=0)),
    (conv(4, 8, 1, groups=2, bias=False), conv(8, 8, 3, 2, groups=8, dilation=2, padding=2)),
    (conv(4, 8, 3, groups=2), conv(8, 8, 1, groups=8)),
    (conv(4, 4, 3, groups=4), conv(4, 4, 1, groups=4)),
    (nn.AvgPool2d(2), conv(4, 6, 1, groups=2)),
    (conv(4, 8, 1, groups=2), nn.AvgPool2d(2)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_two_layers_as_one(pair: tuple[nn.Module, nn.Module]) -> None:
    model = prepared(*pair)
    middle = model[0](x_of(4)).shape[1]
    product = compose(data(model[0], 4), data(model[1], middle))
    assert product is not None
    assert (run(product, x_of(4)) - model(x_of(4))).abs().max() < 1e-12


@pytest.mark.parametrize(
    "pair", [(conv(4, 6, 1), conv(6, 3, 3)), (conv(4, 6, 3), conv(6, 3, 3)), (conv(4, 6, 1, 2, bias=False), conv(6, 3))]
)
def test_pairs_that_are_no_one_kernel(pair: tuple[nn.Module, nn.Module]) -> None:
    """A bias that padding would not show; two wide kernels; a stride before padding."""
    model = prepared(*pair)
    assert compose(data(model[0], 4), data(model[1], 6)) is None


def test_dense_weight_and_identity() -> None:
    grouped = data(conv(6, 4, 3, groups=2).double(), 6)
    dense = replace(grouped, weight=lambda: dense_weight(grouped), groups=1)
    assert (run(dense, x_of(6)) - run(grouped, x_of(6))).abs().max() < 1e-13
    assert torch.equal(run(identity(6), x_of(6)), x_of(6))


def test_join_pairs_every_match() -> None:
    for right in ([2, 0, 5], [2, 0, 2, 5]):
        left = [0, 2, 2, 7]
        i, j = join(torch.tensor(left), torch.tensor(right))
        assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [
            (a, b) for a, x in enumerate(left) for b, y in enumerate(right) if x == y
        ]


def test_assemble_puts_copies_beside() -> None:
    """W1' = [W1; I]: the own rows, and a tap of weight 1 at the centre for each copy."""
    layer = data(conv(3, 4).double(), 3)
    copies = Entries(torch.tensor([4, 5, 6]), torch.arange(3), torch.ones(3, 1, 1, dtype=torch.float64))
    centre = Taps(torch.tensor([1]), torch.tensor([1]), False)
    wide = assemble(layer, Side(torch.arange(3), 3), Side(torch.arange(4), 7), 1, copies, centre)
    assert isinstance(wide, Conv)
    out = run(wide, x_of(3))
    assert (out[:, :4] - run(layer, x_of(3))).abs().max() < 1e-13 and torch.equal(out[:, 4:], x_of(3))


def test_assemble_refuses_to_cross_groups() -> None:
    layer = data(conv(4, 4, groups=2).double(), 4)
    crossing = Entries(torch.tensor([4]), torch.tensor([0]), torch.ones(1, 1, 1, dtype=torch.float64))
    side = Side(torch.arange(4), 8)
    assert "groups" in str(assemble(layer, side, side, 4, crossing, Taps(torch.tensor([1]), torch.tensor([1]), False)))


def test_entries_leave_zeros_out() -> None:
    layer = data(conv(3, 2, 1).double().requires_grad_(False), 3)
    layer.weight()[0, 1] = 0
    assert entries_of(layer).rows.tolist() == [0, 0, 1, 1, 1] and entries_of(layer).columns.tolist() == [0, 2, 0, 1, 2]


def test_layouts() -> None:
    """The last extra group is filled up; interleaved groups hold own channels first."""
    tail = lay_out(Wire(0, 4, 4), 8, torch.full((6,), -1))
    assert not isinstance(tail, str) and tail.total == 16 and tail.reserved.tolist() == [8, 9, 10, 11, 12, 13]
    woven = lay_out(Wire(2), 4, torch.tensor([0, 1, 1]))
    assert not isinstance(woven, str) and woven.total == 8
    assert woven.computed.tolist() == [0, 1, 4, 5] and woven.reserved.tolist() == [2, 6, 7]
    assert isinstance(lay_out(Wire(0, 1, 1), 4, torch.full((3,), -1), extra_groups=2), str)


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
    assert isinstance(wide, Conv) and isinstance(wide.block, Block)
    module, x = build_conv(wide), x_of(120)
    assert (sparse_forward(module, x, wide.block) - module(x)).abs().max() < 1e-12
    module.weight[100, 3, 0, 0] = 5.0
    assert (sparse_forward(module, x, wide.block) - module(x)).abs().max() < 1e-12
