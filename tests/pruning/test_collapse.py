"""Blocks of one convolution: what is fitted, what stays, and that RM then reserves nothing."""

import copy

import pytest
import torch
from marks import few, long
from removal_nets import Residual, basic, conv, conv_bn, has_addition, images, prepared, reservations
from torch import Tensor, nn

import rmprune
from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.pruning.collapse import collapse_blocks, shorten_blocks, shorten_each
from rmprune.removal import plan_removal, remove_residuals


def many(seed: int = 0) -> Tensor:
    return images(count=64, seed=seed)


def network(*blocks: nn.Module) -> nn.Sequential:
    return prepared(*conv_bn(3, 6), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def bottleneck(stride: int = 1, middle: int = 10) -> Residual:
    branch = nn.Sequential(
        *conv_bn(6, middle, 1), nn.ReLU(), *conv_bn(middle, middle, 3, stride), nn.ReLU(), *conv_bn(middle, 6, 1)
    )
    return Residual(branch, conv_bn(6, 6, 1, stride) if stride > 1 else None, nn.ReLU())


@pytest.mark.parametrize("block", [basic(), bottleneck(), bottleneck(stride=2)], ids=["basic", "bottleneck", "strided"])
def test_a_block_becomes_one_layer_that_rm_merges_without_reserving(block: Residual) -> None:
    model = network(block, basic())
    found = collapse_blocks(model, many())
    assert len(found.collapsed) == 2 and found.kept == {}
    removal = remove_residuals(found.model, images())
    assert removal.kept == {} and removal.max_error < 1e-12 and not has_addition(removal.model)
    assert set(reservations(removal).values()) <= {0}
    convolutions = [m for m in removal.model.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size) for m in convolutions] == [
        (3, 6, (3, 3)),
        (6, 6, (3, 3)),
        (6, 6, (3, 3)),
    ]
    assert torch.allclose(removal.model(many()), found.model(many()), atol=1e-10)


class InPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x += self.branch(x)
        return self.after(x)


def test_additions_in_place_are_fitted_as_others_are() -> None:
    blocks = [basic(), basic()]
    written = [InPlace(block.branch, None, block.after) for block in blocks]
    fits = [collapse_blocks(network(*own), many()) for own in (blocks, written)]
    assert fits[0].collapsed == fits[1].collapsed


def test_the_fit_loses_far_less_than_leaving_the_branch_out() -> None:
    model = network(basic(), basic())
    without = network(basic(), basic())
    for block in (without[3], without[4]):
        nn.init.zeros_(block.branch[-1].weight)
        block.branch[-1].bias.copy_(model[3].branch[-1].bias)
    unseen = many(seed=9)
    error = (collapse_blocks(model, many()).model(unseen) - model(unseen)).square().mean()
    assert error < 0.2 * (without(unseen) - model(unseen)).square().mean()


def test_a_branch_that_one_convolution_can_be_is_found() -> None:
    """Its activation never bends anything: the branch is conv(1x1) with a large bias, ReLU, conv(3x3)."""
    inner = conv(6, 6, 1)
    model = network(Residual(nn.Sequential(inner, nn.ReLU(), conv(6, 6, padding=1)), None, nn.ReLU()))
    model[3].branch[0].bias.fill_(50.0)
    model[3].branch[2].bias.fill_(0.0)
    model[3].branch[2].weight[:, :, 1:] = 0
    model[3].branch[2].weight[:, :, :1] = 0
    model[3].branch[2].weight[:, :, 1, 1] = torch.eye(6)  # no border effect of the bias
    found = collapse_blocks(model, many())
    assert next(iter(found.collapsed.values())) > 0.999
    expected, result = model(many(seed=3)), found.model(many(seed=3))
    assert (result - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.long
def test_later_blocks_make_up_for_earlier_ones() -> None:
    """Fitted on what the collapsed network gives, the second block ends nearer to the original than fitted alone."""
    model = network(basic(), basic())
    together = collapse_blocks(model, many()).model(many(1))
    first, second = (block.name for block in plan_removal(model, images()))
    alone = collapse_blocks(model, many(), keep=[second]).model
    fitted_alone = collapse_blocks(model, many(), keep=[first]).model
    pieced = alone(many(1)) + fitted_alone(many(1)) - model(many(1))  # both errors as they come
    assert (together - model(many(1))).norm() < (pieced - model(many(1))).norm()


def test_the_model_is_left_alone_and_two_calls_agree() -> None:
    model = network(basic()).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = collapse_blocks(model, many().float()), collapse_blocks(model, many().float())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert one.collapsed == two.collapsed and not one.model.training
    assert {p.dtype for p in one.model.parameters()} == {torch.float32}
    assert torch.equal(one.model(many().float()), two.model(many().float()))


def test_what_follows_the_blocks_is_unchanged() -> None:
    model = network(basic())
    found = collapse_blocks(model, many()).model
    assert torch.equal(found.get_submodule("6" if hasattr(found, "6") else "_6").weight, model[6].weight)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (basic(outer=False), "no activation follows the addition"),
        (Residual(nn.Sequential(*conv_bn(6, 6)), None, nn.ReLU()), "one layer already"),
        (bottleneck(middle=2), "would cost 5.4 times its branch's MACs"),
        (Residual(nn.Sequential(conv(6, 6), nn.Softmax2d(), conv(6, 6)), None, nn.ReLU()), "Softmax2d"),
    ],
)
def test_blocks_that_stay_say_why(block: Residual, reason: str) -> None:
    found = collapse_blocks(network(block, basic()), many())
    assert len(found.collapsed) == 1 and reason in next(iter(found.kept.values()))


def test_a_network_without_such_a_block_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"no block to collapse: .*no activation follows"):
        collapse_blocks(network(basic(outer=False)), many())
    with pytest.raises(UnsupportedModel, match="no residual"):
        collapse_blocks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), many())


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^keep: no block layer9\.9; there are: "):
        collapse_blocks(network(basic()), many(), keep=["layer9.9"])
    with pytest.raises(ConfigError, match=r"^drop: no block layer9\.9; there are: "):
        shorten_blocks(network(basic()), many(), drop=["layer9.9"])


def test_blocks_asked_to_stay_stay() -> None:
    model = rmprune.models.create("resnet8", num_classes=10, in_channels=1).eval()
    found = collapse_blocks(model, torch.randn(32, 1, 8, 8), keep=["layer2.0"])
    assert set(found.collapsed) == {"layer1.0", "layer3.0"} and found.kept == {"layer2.0": "asked to stay"}
    assert (
        len([m for m in found.model.modules() if isinstance(m, nn.Conv2d)]) == 1 + 1 + 3 + 2
    )  # stem, layer1, layer2, layer3


@pytest.mark.parametrize(
    ("branch", "shortcut"),
    [
        (conv(6, 6, 3, 2), conv(6, 6, 2, 2, padding=0)),
        (conv(6, 6, 3, padding=0), conv(6, 6, 3, padding=0)),
        (conv(6, 6), conv(6, 6, 3, padding=2, dilation=2)),
    ],
    ids=["2x2 of stride 2", "without padding", "dilated"],
)
def test_a_dropped_block_leaves_a_convolution_of_its_shortcuts_geometry(branch: nn.Conv2d, shortcut: nn.Conv2d) -> None:
    model = network(Residual(nn.Sequential(branch, nn.ReLU(), conv(6, 6)), shortcut, nn.ReLU()))
    model[3].branch[2].weight.zero_()  # the shortcut, and a bias, is all that the block gives
    found = shorten_blocks(model, many(), drop=["3"])
    assert found.collapsed["3"] > 0.999
    expected, result = model(many(seed=3)), found.model(many(seed=3))
    assert (result - expected).abs().max() < 0.02 * expected.abs().max()


def plain(last: nn.Module) -> Residual:
    """conv with its bias, act, and `last`; no batch norm."""
    return Residual(nn.Sequential(conv(6, 6), nn.ReLU(), last), None, nn.ReLU())


@pytest.mark.parametrize(
    ("block", "fitted"),
    [
        long(basic(), "4.branch.3"),
        long(plain(conv(6, 6)), "4.branch.2"),
        (bottleneck(stride=2), "4.branch.6"),
        long(plain(conv(6, 6, groups=6)), "4.branch.2"),
        (plain(nn.Sequential(conv(6, 6), nn.ReLU())), None),
    ],
    ids=["basic", "no norm", "strided", "depthwise", "activation at the end"],
)
@pytest.mark.parametrize("how", few(["collapse", "drop"], "drop"))
def test_blocks_behind_a_shortened_one_make_up_for_it(
    block: Residual, fitted: str | None, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the next block the last convolution is fitted anew, under its name, and nothing else; the network ends nearer to the original."""
    model = network(basic(), copy.deepcopy(block), basic(), basic())
    before, x = model.state_dict(), many(1)
    names = [found.name for found in plan_removal(model, images())]
    ends = {}
    for behind in (0, 1):
        monkeypatch.setattr("rmprune.pruning.collapse.MENDED", behind)
        found = shorten_blocks(model, many(), **{how: names[:1]})
        assert list(found.collapsed) == names[:1]
        ends[behind] = float((found.model(x) - model(x)).detach().norm())
    now = {name.replace("_", "."): value for name, value in found.model.named_parameters()}
    changed = {name for name, value in now.items() if name in before and not torch.equal(value, before[name])}
    assert {name.removesuffix(".weight") for name in changed if before[name].dim() == 4} == (
        {fitted} if fitted else set()
    )
    if fitted is None:
        assert ends[1] == ends[0]
    elif getattr(block.branch[-1], "groups", 1) == 1:  # depthwise, the sum is nearer, but not what comes of it here
        assert ends[1] < ends[0]


def error(model: nn.Module, found: nn.Module, x: Tensor) -> float:
    return float((found(x) - model(x)).detach().norm())


@pytest.mark.long
def test_an_ending_of_more_unknowns_than_positions_is_as_good_on_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = [basic(64), basic(64), basic(64)]
    model = prepared(*conv_bn(3, 64), nn.ReLU(), *wide)
    draw = torch.Generator().manual_seed(0)
    few, others = (torch.randn(count, 3, 4, 4, generator=draw, dtype=torch.float64) for count in (32, 256))
    first = plan_removal(model, few[:2])[0].name
    errors = []
    for behind in (0, 2):
        monkeypatch.setattr("rmprune.pruning.collapse.MENDED", behind)
        errors.append(error(model, shorten_blocks(model, few, drop=[first]).model, others))
    assert errors[1] < 0.6 * errors[0]  # 0.49; without images held back 0.75


class Gated(nn.Module):
    """x + positive(sigmoid(conv(x))), without an activation behind: never below 0, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = conv(6, 6), conv(6, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.sigmoid(self.inner(x)))


class Sums(nn.Module):
    """Additions that end no block that can be followed."""

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x) + torch.sigmoid(x)) + torch.sin(x)


def test_an_activation_behind_a_fitted_ending_stays_where_it_does_something() -> None:
    """What the sum was before its last convolution was fitted says nothing of what it is now."""
    model = network(basic(), Gated(), basic())
    with torch.no_grad():
        model[4].outer.weight.abs_()
    names = [block.name for block in plan_removal(model, images())]
    found = shorten_blocks(model, many(), drop=[names[0], names[2]]).model
    gone = shorten_blocks(model, many(), drop=[names[2]]).model  # nothing is fitted before that one: it goes
    acts = [sum(isinstance(m, nn.ReLU) for m in net.modules()) for net in (found, gone)]
    x = many(1)
    sums: list[Tensor] = []
    last = next(m for m in found.modules() if isinstance(m, nn.AdaptiveAvgPool2d))
    last.register_forward_hook(lambda _, given, __: sums.append(given[0].detach()))
    found(x)
    assert acts == [1 + 1, 1 + 2] and float(sums[0].min()) >= 0  # the stem's, and that of the last block


def test_additions_that_end_no_block_do_not_count() -> None:
    model = network(basic(), Sums(), basic())
    first = plan_removal(model, images())[0].name
    before, found = model.state_dict(), shorten_blocks(model, many(), drop=[first]).model
    now = {name.replace("_", "."): value for name, value in found.named_parameters()}
    assert not torch.equal(now["5.branch.3.weight"], before["5.branch.3.weight"])


@pytest.mark.long
def test_several_ways_at_once_are_what_each_is_alone() -> None:
    """To the last bit: what a network shares with the original is run once, and with another changed one nothing."""
    model = network(basic(), bottleneck(stride=2), InPlace(basic().branch, None, nn.ReLU()), Sums(), basic(), basic())
    names = [block.name for block in plan_removal(model, images())]
    single = next(name for name in names if name.startswith("6"))  # an addition that ends no block
    ends = [name for name in names if name != single and not name.startswith("6")]
    ways = [{name: bool(place % 2)} for place, name in enumerate(ends)]
    ways += [{ends[0]: True, ends[3]: False}, {}]
    found = dict(shorten_each(model, many(), ways))
    assert sorted(found) == list(range(len(ways)))
    for number, way in enumerate(ways):
        collapse, drop = ([name for name, dropped in way.items() if dropped == gone] for gone in (False, True))
        alone = shorten_blocks(model, many(), collapse=collapse, drop=drop)
        assert (alone.collapsed, alone.kept) == (found[number].collapsed, found[number].kept)
        states = alone.model.state_dict(), found[number].model.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items()), way


class Mixed(Residual):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_autocast_that_is_left_out_is_noted() -> None:
    block = basic()
    model = network(Mixed(block.branch, None, block.after), basic()).float()
    assert "autocast in forward is left out (3 (Mixed)" in collapse_blocks(model, many().float()).note
