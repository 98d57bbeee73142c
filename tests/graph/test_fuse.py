"""Neighbours that are one linear map become one layer, where they are."""

from collections.abc import Callable

import pytest
from conv_data import data, run, x_of
from removal_nets import (
    conv,
    conv_bn,
    fold_batch_norms,
    fuse_linear,
    has_addition,
    images,
    prepared,
    small_resnet,
)
from torch import nn

from rmprune.graph.fuse import compose

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


def test_fuse_linear_multiplies_neighbours_where_cheaper() -> None:
    model = prepared(*conv_bn(3, 4, 1), conv(4, 8), *conv_bn(8, 2, 1), nn.ReLU(), conv(2, 16, 1), conv(16, 3, 1))
    fused = fuse_linear(model, images())
    convs = [module for module in fused.modules() if isinstance(module, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convs] == [
        (3, 4, (1, 1)),
        (4, 2, (3, 3)),
        (2, 3, (1, 1)),
    ]
    assert (fused(images()) - model(images())).abs().max() < 1e-12
    kept = fuse_linear(model, images(), "never")
    assert sum(isinstance(module, nn.Conv2d) for module in kept.modules()) == 5


def test_a_padded_kernel_after_a_bias_is_not_fused() -> None:
    """The border would see the bias where the original sees zero padding."""
    model = prepared(conv(3, 2, 1), conv(2, 2))
    assert sum(isinstance(m, nn.Conv2d) for m in fuse_linear(model, images(), "always").modules()) == 2
    model[0].bias.zero_()
    fused = fuse_linear(model, images(), "always")
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 1
    assert (fused(images()) - model(images())).abs().max() < 1e-12


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (conv(8, 8, groups=8), nn.BatchNorm2d(8), conv(8, 16, 1, groups=2)),
        lambda: (conv(8, 16, 1, groups=2, bias=False), conv(16, 16, groups=16), nn.BatchNorm2d(16)),
    ],
    ids=["depthwise first", "depthwise last"],
)
def test_depthwise_and_grouped_convolutions_are_multiplied(layers: Callable[[], tuple[nn.Module, ...]]) -> None:
    model, x = prepared(*layers()), images(8)
    fused = fuse_linear(model, x, "always")
    (product,) = [module for module in fused.modules() if isinstance(module, nn.Conv2d)]
    assert product.groups == 2 and product.kernel_size == (3, 3)
    assert (fused(x) - model(x)).abs().max() < 1e-12


def test_fold_batch_norms() -> None:
    model = small_resnet()
    folded = fold_batch_norms(model, images())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) and has_addition(folded)
    assert (folded(images()) - model(images())).abs().max() < 1e-12
