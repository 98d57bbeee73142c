"""Which geometry can go (RM.md 3): strides, padding, dilation, groups, pools, pre-activation, kernels of any shape."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from removal_nets import Residual, basic, conv, conv_bn, has_addition, images, prepared, worst_error
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.convolution import Geometry
from rmprune.removal import Removal, remove_residuals
from rmprune.removal.geometry import Grid, place


def removed(model: nn.Module, size: int = 8) -> Removal:
    removal = remove_residuals(model, images(size=size))
    assert not removal.kept and not has_addition(removal.model)
    for other in (size, size + 1, size + 3):
        assert worst_error(removal, model, size=other) < 1e-11
    return removal


def refused(model: nn.Module, why: str, size: int = 8) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        remove_residuals(model, images(size=size))


def stem(width: int = 6) -> list[nn.Module]:
    return [*conv_bn(3, width), nn.ReLU()]


def branch(*layers: nn.Module) -> nn.Sequential:
    """The layers with a ReLU between."""
    chain: list[nn.Module] = []
    for layer in layers:
        chain += [*(layer if isinstance(layer, nn.Sequential) else [layer]), nn.ReLU()]
    return nn.Sequential(*chain[:-1])


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


def test_extra_groups_in_the_middle() -> None:
    """ResNeXt: reserved channels join as whole groups of the same width, zeros fill the last."""
    layers = [conv_bn(6, 8, 1), conv_bn(8, 8, groups=2), conv_bn(8, 6, 1)]
    removal = removed(prepared(*stem(), Residual(branch(*layers), None, nn.ReLU())))
    middle = [m for m in removal.model if isinstance(m, nn.Conv2d)][2]
    assert (middle.groups, middle.in_channels, middle.out_channels) == (4, 16, 16)


def test_depthwise_in_the_middle() -> None:
    layers = [conv_bn(6, 8, 1), conv_bn(8, 8, groups=8), conv_bn(8, 6, 1)]
    removal = removed(prepared(*stem(), Residual(branch(*layers), None, nn.ReLU())))
    middle = [m for m in removal.model if isinstance(m, nn.Conv2d)][2]
    assert (middle.groups, middle.in_channels, middle.out_channels) == (14, 14, 14)


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("where", ["first", "last", "both"])
def test_groups_at_the_ends_are_interleaved(groups: int, where: str) -> None:
    first = groups if where in ("first", "both") else 1
    last = groups if where in ("last", "both") else 1
    layers = [conv_bn(6, 12, groups=first), conv_bn(12, 6, groups=last)]
    removal = removed(prepared(*stem(), Residual(branch(*layers), None, nn.ReLU())))
    made = [m.groups for m in removal.model if isinstance(m, nn.Conv2d)][1:]
    assert made == [first, last]


def test_a_dense_shortcut_into_a_grouped_merge_copies_what_each_group_reads() -> None:
    removed(prepared(*stem(), Residual(branch(conv_bn(6, 8, 1), conv_bn(8, 4, groups=2)), conv_bn(6, 4, 1), nn.ReLU())))


def test_groups_that_do_not_fit_are_refused() -> None:
    layers = [conv_bn(6, 6, groups=2), conv_bn(6, 6, groups=3)]
    refused(prepared(*stem(), Residual(branch(*layers))), "different numbers of groups")
    silu = nn.Sequential(*conv_bn(3, 4, 1), nn.SiLU(), *conv_bn(4, 4, groups=4), nn.SiLU(), *conv_bn(4, 3, 1))
    refused(prepared(Residual(silu)), "grouped convolution")


def test_linear_branches_merge_with_nothing_reserved() -> None:
    """RepVGG: 3x3 with batch norm, 1x1 with batch norm, and the identity with a batch norm are one 3x3."""

    class ThreeWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.point, self.norm = conv_bn(6, 6), conv_bn(6, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.wide(x) + self.point(x) + self.norm(x))

    removal = removed(prepared(*stem(), ThreeWays(), ThreeWays()))
    assert [(b.form, b.reserved) for b in removal.blocks] == [("linear", 0)] * 4
    assert removal.removed == ["3#1", "3#2", "4#1", "4#2"]
    assert [m.kernel_size for m in removal.model if isinstance(m, nn.Conv2d)] == [(3, 3)] * 3


class PreActivation(nn.Module):
    def __init__(self, width: int, after: bool) -> None:
        super().__init__()
        self.norm, self.body = nn.BatchNorm2d(width), branch(conv_bn(width, width), conv(width, width))
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.norm(x))
        return self.body(first) + (first if self.after else x)


@pytest.mark.parametrize(("after", "form"), [(True, "free"), (False, "pair")])
def test_pre_activation(after: bool, form: str) -> None:
    """The shortcut leaves after the activation, where x >= 0, or before it, where nothing bounds x."""
    removal = removed(prepared(conv(3, 6), PreActivation(6, after), PreActivation(6, after)))
    assert [block.form for block in removal.blocks] == [form, form]


def test_branches_that_end_in_an_activation() -> None:
    """DarkNet: x + act(bn(conv(x))) gets a linear 1x1 as merge."""
    layers = nn.Sequential(*conv_bn(6, 3, 1), nn.LeakyReLU(0.1), *conv_bn(3, 6), nn.LeakyReLU(0.1))
    removed(prepared(*conv_bn(3, 6), nn.LeakyReLU(0.1), Residual(layers), Residual(layers)))


def test_nested_blocks() -> None:
    inner = nn.Sequential(*conv_bn(6, 6), nn.ReLU(), basic(), *conv_bn(6, 6))
    removal = removed(prepared(*stem(), Residual(inner, None, nn.ReLU())))
    assert removal.removed == ["3.branch.3", "3"]


def test_a_block_around_one_that_stays_says_so() -> None:
    inner = nn.Sequential(*conv_bn(6, 6), nn.ReLU(), basic(), *conv_bn(6, 6))
    model = prepared(*stem(), Residual(inner, None, nn.ReLU()), basic())
    removal = remove_residuals(model, images(), keep=["3.branch.3"])
    assert removal.removed == ["4"] and removal.kept["3"] == "its branch holds another residual that stays"


def test_gates_are_refused_by_name() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = branch(conv_bn(6, 6), conv_bn(6, 6))
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return torch.relu(y * self.gate(y) + x)

    refused(prepared(*stem(), Gated()), "squeeze-and-excitation")


REASONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "slice": (lambda y: torch.relu(y)[:, :, 1:, 1:-1], r"a slice, x\[:, :, 1:, 1:-1\]"),
    "method": (lambda y: y.permute(0, 1, 3, 2), r"a call of x\.permute\(\.\.\.\)"),
    "function": (lambda y: torch.flip(y, [2]), r"a call of flip\(\.\.\.\)"),
    "module": (lambda y: F.max_pool2d(y, 3, 1, 1), r"MaxPool2d is no convolution, batch norm, average pool or scaling"),
    "read twice": (lambda y: torch.relu(y) * torch.relu(y).mean(), "multiplied by a value"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_name_code(name: str) -> None:
    """Not the nodes of a graph, which a user has never seen."""
    code, why = REASONS[name]

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = branch(conv_bn(6, 6), conv_bn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, 1:, 1:-1] + code(self.body(x)) if name == "slice" else x + code(self.body(x))

    refused(prepared(*stem(), Odd()), why)


def test_two_nonlinear_ways_are_refused() -> None:
    other = branch(conv_bn(6, 6), conv_bn(6, 6))
    refused(prepared(*stem(), Residual(branch(conv_bn(6, 6), conv_bn(6, 6)), other)), "both ways")


def test_scaled_branches() -> None:
    """Inception-ResNet's 0.2 * f(x) + x."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = branch(conv_bn(6, 6), conv_bn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(0.2 * self.body(x) + x)

    removed(prepared(*stem(), Scaled(), Scaled()))


def test_dilation_instead_of_stride() -> None:
    layers = [conv_bn(6, 4, 1), conv_bn(4, 4, 3, dilation=4, padding=4), conv_bn(4, 6, 1)]
    removed(prepared(*stem(), Residual(branch(*layers), None, nn.ReLU())), size=9)


def test_place_by_hand() -> None:
    """A 1x1 stride-2 shortcut sits at the centre of a 3x3 stride-2 kernel with padding 1, and at no tap of one without."""
    fork = Grid((1, 1), (8, 8))
    found = place(Geometry((1, 1), (2, 2)), fork, Geometry((3, 3), (2, 2), (1, 1)), fork, (4, 4))
    assert (
        not isinstance(found, str)
        and found.rows.tolist() == [1]
        and found.columns.tolist() == [1]
        and not found.reads_padding
    )
    pool = place(Geometry((2, 2), (2, 2)), fork, Geometry((3, 3), (2, 2), (1, 1)), fork, (4, 4))
    assert not isinstance(pool, str) and pool.rows.tolist() == [1, 2]
    dilated = place(Geometry(), fork, Geometry((3, 3), (1, 1), (1, 1), (2, 2)), fork, (6, 6))
    assert isinstance(dilated, str) and "grid" in dilated


@pytest.mark.parametrize("passed", [2, 4])
def test_a_reserve_ratio_ends_as_one_kernel(passed: int) -> None:
    """RM.md 7: cat(x[:rC], bn3(conv3(x)) + bn1(conv1(x)) + bn0(x[rC:])) is one 3x3 whose first rows are Dirac."""

    class Reserving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.point, self.norm = (
                conv_bn(6, 6 - passed),
                conv_bn(6, 6 - passed, 1),
                nn.BatchNorm2d(6 - passed),
            )

        def forward(self, x: Tensor) -> Tensor:
            rest = self.wide(x) + self.point(x) + self.norm(x[:, passed:])
            return torch.relu(torch.cat([x[:, :passed], rest], 1))

    removal = removed(prepared(*stem(), Reserving(), Reserving()))
    assert type(removal.model) is nn.Sequential
    assert [(m.in_channels, m.out_channels) for m in removal.model if isinstance(m, nn.Conv2d)] == [
        (3, 6),
        (6, 6),
        (6, 6),
    ]


def test_separable_convolutions_keep_their_pairs() -> None:
    """Xception: activation, depthwise, pointwise, three times; nothing bounds x, and a depthwise layer cannot mix a pair."""
    layers: list[nn.Module] = []
    for inputs in (6, 8, 8):
        layers += [nn.ReLU(), *conv_bn(inputs, inputs, groups=inputs), *conv_bn(inputs, 8, 1)]
    removal = removed(prepared(*conv_bn(3, 6), Residual(nn.Sequential(*layers), conv_bn(6, 8, 1))))
    assert removal.blocks[0].form == "pair"


def test_layers_with_dynamic_padding_are_no_plain_convolutions() -> None:
    """timm's Conv2dSame is an nn.Conv2d of padding 0 that pads by itself."""
    timm_layers = pytest.importorskip("timm.layers")
    inner = nn.Sequential(timm_layers.Conv2dSame(6, 6, 3), nn.ReLU(), *conv_bn(6, 6))
    model = prepared(*stem(), Residual(inner, None, nn.ReLU()), basic())
    removal = remove_residuals(model, images())
    assert removal.removed == ["4"] and list(removal.kept) == ["3"] and worst_error(removal, model) < 1e-12
