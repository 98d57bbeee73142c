"""Which geometry can go (RM.md 3): strides, padding, dilation, groups, pools, pre-activation, kernels of any shape."""

import pytest
import torch.nn.functional as F
from removal_nets import Residual, branch, conv, conv_bn, images, prepared, refused, removed, stem, worst_error
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.convolution import Geometry
from rmprune.graph.obstacle import Obstacle
from rmprune.removal import remove_residuals
from rmprune.removal.geometry import Grid, tap_grid


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [conv_bn(6, 6, 1), conv_bn(6, 6)],
        lambda: [conv_bn(6, 6, 5), conv_bn(6, 6, 1)],
        lambda: [conv(6, 6, 3, dilation=2, padding=2), conv(6, 6, 3, dilation=3, padding=3)],
        lambda: [nn.Conv2d(6, 6, (1, 3), padding=(0, 1)), nn.Conv2d(6, 6, (3, 1), padding=(1, 0))],
        lambda: [nn.Conv2d(6, 6, (7, 1), padding=(3, 0)), nn.Conv2d(6, 6, (1, 5), padding=(0, 2))],
        lambda: [conv(6, 6, padding_mode="reflect"), conv(6, 6, padding_mode="circular")],
        lambda: [conv(6, 6, padding="same"), conv(6, 6)],
        lambda: [conv(6, 6, 2, padding=1), conv(6, 6, 2, padding=0)],
        lambda: [conv(6, 6, 3, padding=2), conv(6, 6, 3, padding=0)],
    ],
)
def test_identity_through_kernels_of_any_shape(layers: object) -> None:
    model = prepared(*stem(), Residual(branch(*layers()), None, nn.ReLU()))  # type: ignore[operator]
    try:
        removed(model)
    except UnsupportedModel:  # the last two read beside the pixel: only a refusal is allowed there
        assert model[3].branch[0].padding[0] != model[3].branch[0].dilation[0] * (
            model[3].branch[0].kernel_size[0] // 2
        )


def test_a_branch_that_shrinks_and_grows_back_is_refused() -> None:
    refused(
        prepared(*stem(), Residual(branch(conv(6, 6, 3, padding=0), conv(6, 6, 3, padding=2)))), "3x3|padding|reads"
    )


def test_stride_two_with_a_convolution() -> None:
    model = prepared(*stem(), Residual(branch(conv_bn(6, 8, stride=2), conv_bn(8, 8)), conv_bn(6, 8, 1, 2), nn.ReLU()))
    assert removed(model).blocks[0].reserved == 6


def test_equal_width_with_stride_two() -> None:
    """RM.md 4, row 2: the reference looks at widths, ignores the shortcut convolution and is off by 4.0."""
    model = prepared(*stem(), Residual(branch(conv_bn(6, 6, stride=2), conv_bn(6, 6)), conv_bn(6, 6, 1, 2), nn.ReLU()))
    assert removed(model).blocks[0].shortcut == "conv 1x1/2"


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_stride_may_stand_in_any_layer(at: int) -> None:
    strides = [2 if i == at else 1 for i in range(3)]
    layers = [conv_bn(6, 4, 1, strides[0]), conv_bn(4, 4, 3, strides[1]), conv_bn(4, 8, 1, strides[2])]
    removed(prepared(*stem(), Residual(branch(*layers), conv_bn(6, 8, 1, 2), nn.ReLU())))


def test_two_strides_make_four() -> None:
    layers = [conv_bn(6, 4, 3, 2), conv_bn(4, 8, 3, 2)]
    removed(prepared(*stem(), Residual(branch(*layers), conv_bn(6, 8, 1, 4), nn.ReLU())), size=12)


def test_a_shortcut_on_another_grid_is_refused() -> None:
    """The same sizes, but the branch reads pixels 0, 2, 4 where the shortcut reads others or more."""
    layers = [nn.Conv2d(6, 6, 1, 2), conv(6, 6, 1)]
    refused(prepared(*stem(), Residual(branch(*layers), nn.Conv2d(6, 6, 2, 2))), "grid|has no tap")
    refused(prepared(*stem(), Residual(branch(*layers), nn.Conv2d(6, 6, 3, 2, padding=1))), "grid|has no tap")


def test_a_shortcut_that_pads_otherwise_than_the_branch_is_refused() -> None:
    layers = [conv_bn(6, 6, 1), conv(6, 6)]
    refused(prepared(*stem(), Residual(branch(*layers), conv(6, 6, padding_mode="circular"))), "pads with circular")


def test_a_shortcut_kernel_that_fits() -> None:
    """A 3x3 shortcut in the 3x3 of the merge, padding read by both."""
    removed(prepared(*stem(), Residual(branch(conv_bn(6, 6, 1), conv_bn(6, 6)), conv_bn(6, 6), nn.ReLU())))


def test_a_shortcut_kernel_that_fits_nowhere_is_refused() -> None:
    refused(
        prepared(*stem(), Residual(branch(conv_bn(6, 6), conv_bn(6, 6)), conv_bn(6, 6, 5), nn.ReLU())),
        "3x3 kernel .* has no tap",
    )


def test_a_shifted_copy_must_not_meet_padding() -> None:
    """x is not zero at the border once it is shifted; a 3x3 shortcut in the merge would read shifted zeros."""
    block = Residual(nn.Sequential(*conv_bn(4, 6, 1), nn.ReLU6(), *conv_bn(6, 4)), conv_bn(4, 4))
    model = prepared(conv(3, 6), nn.ReLU6(), conv(6, 4), block)
    removal = remove_residuals(model, images(), form="pair")
    assert removal.blocks[0].form == "pair" and worst_error(removal, model) < 1e-12
    refused_or_exact = remove_residuals(model, images())
    assert worst_error(refused_or_exact, model) < 1e-11


def test_the_shortcut_goes_where_it_is_cheaper() -> None:
    """Many inputs, few outputs: the shortcut convolution in the first layer reserves 2 x 2 copies instead of 24."""
    block = Residual(branch(conv_bn(24, 4, 1), conv_bn(4, 4), conv_bn(4, 2, 1)), conv_bn(24, 2, 1))
    removal = removed(prepared(*stem(24), block))
    assert removal.blocks[0].reserved == 4 and removal.blocks[0].form == "pair"


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(2, 2), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)]
)
def test_resnet_d_average_pools(pool: nn.AvgPool2d) -> None:
    down = nn.Sequential(pool, *conv_bn(6, 8, 1))
    block = Residual(branch(conv_bn(6, 4, 1), conv_bn(4, 4, 3, 2), conv_bn(4, 8, 1)), down, nn.ReLU())
    model = prepared(*stem(), block)
    removal = remove_residuals(model, images(size=8))
    assert (
        removal.blocks[0].shortcut == f"pool {pool.kernel_size}x{pool.kernel_size}/2 + conv 1x1"
        and removal.blocks[0].reserved <= 8
    )
    assert worst_error(removal, model, size=8) < 1e-12
    assert ("ceil_mode" in removal.blocks[0].note) == pool.ceil_mode


def test_pools_that_are_no_one_kernel_are_refused() -> None:
    partial = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), *conv_bn(6, 8, 1))
    block = Residual(branch(conv_bn(6, 4, 3, 2), conv_bn(4, 8, 1)), partial)
    refused(prepared(*stem(), block), "partial windows", size=9)
    fewer = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    refused(prepared(*stem(), Residual(branch(conv_bn(6, 6), conv_bn(6, 6)), fewer)), "count_include_pad")


def test_a_shortcut_without_parameters() -> None:
    """Option A of the CIFAR ResNets: subsample, pad with channels of zeros."""

    class OptionA(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1), "constant", 0)

    removal = removed(prepared(*stem(), Residual(branch(conv_bn(6, 8, 3, 2), conv_bn(8, 8)), OptionA(), nn.ReLU())))
    assert removal.blocks[0].reserved == 6


def test_dilation_instead_of_stride() -> None:
    layers = [conv_bn(6, 4, 1), conv_bn(4, 4, 3, dilation=4, padding=4), conv_bn(4, 6, 1)]
    removed(prepared(*stem(), Residual(branch(*layers), None, nn.ReLU())), size=9)


def test_place_by_hand() -> None:
    """A 1x1 stride-2 shortcut sits at the centre of a 3x3 stride-2 kernel with padding 1, and at no tap of one without."""
    fork = Grid((1, 1), (8, 8))
    found = tap_grid(Geometry((1, 1), (2, 2)), fork, Geometry((3, 3), (2, 2), (1, 1)), fork, (4, 4))
    assert found.rows.tolist() == [1] and found.columns.tolist() == [1] and not found.reads_padding
    pool = tap_grid(Geometry((2, 2), (2, 2)), fork, Geometry((3, 3), (2, 2), (1, 1)), fork, (4, 4))
    assert pool.rows.tolist() == [1, 2]
    with pytest.raises(Obstacle, match="grid"):
        tap_grid(Geometry(), fork, Geometry((3, 3), (1, 1), (1, 1), (2, 2)), fork, (6, 6))
