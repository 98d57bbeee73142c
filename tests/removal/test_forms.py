"""How copies pass activations (RM.md 2): the row of each activation, bounds, dead channels, precision in float32."""

import math

import pytest
import torch
from marks import few
from removal_nets import Residual, basic, conv, conv_bn, images, prepared, reservations, worst_error
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.activations import image, rule_of
from rmprune.removal import plan_removal, remove_residuals
from rmprune.removal.forms import Code, cheapest_code

BOUNDED = [nn.ReLU6, lambda: nn.Hardtanh(-1.0, 1.0), lambda: nn.Hardtanh(0.5, 2.0), lambda: nn.Hardtanh(-3.0, 4.0)]
STOCK = [
    nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1, 1), nn.Hardtanh(0.5, 2), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.3), nn.LeakyReLU(1.5),
    nn.PReLU(init=0.3), nn.PReLU(4), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Softplus(threshold=40), nn.Sigmoid(),
    nn.Hardsigmoid(), nn.Tanh(), nn.ELU(), nn.Mish(),
]  # fmt: skip


def act_name(act: object) -> str:
    return repr(act() if callable(act) and not isinstance(act, nn.Module) else act)


@pytest.mark.parametrize("act", STOCK, ids=act_name)
def test_the_facts_of_each_activation(act: nn.Module) -> None:
    """Identity on [low, high]; act(x) - act(-x) = c x; the image of an interval holds every value."""
    act = act.double().requires_grad_(False)
    rule = rule_of(act)
    assert rule is not None
    x = torch.linspace(-30, 30, 60001, dtype=torch.float64)[None, :, None].expand(1, -1, 4).transpose(1, 2)
    if rule.low <= rule.high:
        inside = x.clamp(rule.low, min(rule.high, 1e9))
        assert (act(inside) - inside).abs().max() <= 1e-14
    if rule.odd is not None:
        inside = x.clamp(-rule.reach, rule.reach)
        assert (act(inside) - act(-inside) - rule.odd * inside).abs().max() < 1e-13
    ends = torch.tensor(
        [-math.inf, -4.0, -1.3, -0.6, -0.2, 0.0, 0.1, 0.7, 2.0, 5.0, 7.0, math.inf], dtype=torch.float64
    )
    for low in ends[:-1]:
        for high in ends[ends > low]:
            found = image(act, low.expand(4), high.expand(4))
            assert found is not None
            values = act(x.clamp(low, high))
            assert not torch.isnan(torch.stack(found)).any()
            slack = 1e-12  # annotate_ranges widens by as much
            assert (values >= found[0][:, None] - slack).all() and (values <= found[1][:, None] + slack).all(), (
                low,
                high,
            )


@pytest.mark.parametrize("act", BOUNDED, ids=act_name)
@pytest.mark.parametrize("form", ["auto", "shift"])
def test_bounded_activations_are_passed_by_a_shift(act: type[nn.Module], form: str) -> None:
    """x is the sum of a linear layer on bounded values: finite bounds that hold for every input, one stock activation."""
    first = nn.Hardtanh(-1.0, 1.0)
    block = Residual(nn.Sequential(*conv_bn(5, 7), act(), *conv_bn(7, 7, groups=7), act(), *conv_bn(7, 5)))
    model = prepared(conv(3, 6), first, conv(6, 5), block, gain=3.0)
    removal = remove_residuals(model, images(), form=form)
    (report,) = removal.blocks
    assert report.form == "shift" and report.reserved == 5
    assert sum(type(m) is type(act()) for m in removal.model) == 2 + isinstance(first, type(act()))
    assert worst_error(removal, model) < 1e-11


def test_bounds_add_up_along_a_stage() -> None:
    """MobileNetV2: every block reads ReLU6 values, so block after block has finite bounds."""

    def block() -> Residual:
        return Residual(
            nn.Sequential(*conv_bn(4, 8, 1), nn.ReLU6(), *conv_bn(8, 8, groups=8), nn.ReLU6(), *conv_bn(8, 4, 1))
        )

    model = prepared(conv(3, 6), nn.ReLU6(), conv(6, 4, 1), block(), block(), block(), gain=2.0)
    removal = remove_residuals(model, images(), form="shift")
    assert [report.form for report in removal.blocks] == ["shift"] * 3
    assert worst_error(removal, model) < 1e-11


@pytest.mark.parametrize(
    "act", [nn.ReLU, nn.SiLU, nn.GELU, lambda: nn.GELU("tanh"), nn.Hardswish, lambda: nn.LeakyReLU(0.1)], ids=act_name
)
def test_a_pair_needs_no_bounds(act: type[nn.Module]) -> None:
    """act(x) - act(-x) = c x: two copies recover any x exactly, SiLU and GELU included, which RM.md 2 had refused."""
    branch = nn.Sequential(*conv_bn(3, 6), act(), *conv_bn(6, 6), act(), *conv_bn(6, 3))
    model = prepared(Residual(branch), gain=2.0)
    removal = remove_residuals(model, images())
    assert removal.blocks[0].form == "pair" and removal.blocks[0].reserved == 6
    assert worst_error(removal, model) < 1e-12


def test_a_negative_input_to_a_relu_block_is_no_trap() -> None:
    """RM.md 4, row 5: the block reads what no ReLU has cut. The reference is silently wrong."""
    model = prepared(conv(3, 4), basic(4), gain=2.0)
    removal = remove_residuals(model, images())
    assert removal.blocks[0].form == "pair" and worst_error(removal, model) < 1e-12


def test_an_input_range_gives_bounds() -> None:
    model = prepared(Residual(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), *conv_bn(6, 3))))
    x = images().sigmoid()
    removal = remove_residuals(model, x, input_range=(0.0, 1.0))
    assert removal.blocks[0].form == "free" and removal.blocks[0].reserved == 3
    removal = remove_residuals(model, x * 2 - 1, input_range=(-1.0, 1.0))
    assert removal.blocks[0].form == "shift" and removal.blocks[0].reserved == 3
    inside = torch.rand(4, 3, 8, 8, dtype=torch.float64) * 2 - 1
    assert (removal.model(inside) - model(inside)).abs().max() < 1e-12


@pytest.mark.parametrize("slopes", [1, 6])
def test_prelu_copies_get_slope_one(slopes: int) -> None:
    branch = nn.Sequential(*conv_bn(3, 6), nn.PReLU(slopes), *conv_bn(6, 3))
    model = prepared(Residual(branch))
    torch.nn.init.uniform_(branch[2].weight, -0.5, 1.5)
    removal = remove_residuals(model, images())
    assert removal.blocks[0].form == "slope" and removal.blocks[0].reserved == 3
    prelu = next(module for module in removal.model if isinstance(module, nn.PReLU))
    assert prelu.weight[:6].tolist() == branch[2].weight.expand(6).tolist() and prelu.weight[6:].tolist() == [1.0] * 3
    assert worst_error(removal, model) < 1e-12


def test_hardswish_is_passed_above_three() -> None:
    branch = nn.Sequential(*conv_bn(5, 6), nn.Hardswish(), *conv_bn(6, 5))
    model = prepared(conv(3, 6), nn.ReLU6(), conv(6, 5), Residual(branch))
    removal = remove_residuals(model, images())
    assert removal.blocks[0].form == "shift" and removal.blocks[0].reserved == 5
    assert worst_error(removal, model) < 1e-12


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh, nn.Mish])
def test_activations_that_nothing_passes_are_refused(act: type[nn.Module]) -> None:
    model = prepared(Residual(nn.Sequential(*conv_bn(3, 6), act(), *conv_bn(6, 3))))
    with pytest.raises(UnsupportedModel, match="nowhere the identity"):
        remove_residuals(model, images())


def test_a_clipping_activation_without_bounds_is_refused_with_the_ways_out() -> None:
    model = prepared(Residual(nn.Sequential(*conv_bn(3, 6), nn.ReLU6(), *conv_bn(6, 3))))
    with pytest.raises(UnsupportedModel, match=r"3 channels have no provable bounds .* ranges='calibrated'"):
        remove_residuals(model, images())
    assert plan_removal(model, images())[0].reason.startswith("3 channels")


def test_calibrated_bounds_are_exact_inside() -> None:
    """The first block has no provable bounds, calibrated ones do; on inputs like the examples the result is exact."""
    model = prepared(Residual(nn.Sequential(*conv_bn(3, 6), nn.ReLU6(), *conv_bn(6, 3))))
    x = images(count=8).clamp(-3, 3)
    removal = remove_residuals(model, x, ranges="calibrated")
    assert removal.blocks[0].form in ("shift", "pair")
    assert removal.note == "exact where maps stay within 2 times the ranges of the examples"
    other = images(count=4, seed=11).clamp(-3, 3)
    assert (removal.model(other) - model(other)).abs().max() < 1e-12


def test_dead_channels_need_no_copy() -> None:
    """A channel whose scale is zero is one number for every input: it goes into the merge's bias (RM.md 5, 6)."""
    model = prepared(*conv_bn(3, 6), nn.ReLU(), basic())
    model[1].weight[:2] = 0.0
    model[1].bias[:2] = torch.tensor([0.7, -0.7], dtype=torch.float64)
    removal = remove_residuals(model, images())
    assert reservations(removal) == {"3": 4} and worst_error(removal, model) < 1e-12


def test_channels_that_nothing_reads_need_no_copy() -> None:
    shortcut = conv_bn(6, 6, 1)
    model = prepared(
        *conv_bn(3, 6), nn.ReLU(), Residual(nn.Sequential(*conv_bn(6, 6), nn.ReLU(), *conv_bn(6, 6)), shortcut)
    )
    shortcut[0].weight[:, 1:4] = 0.0
    removal = remove_residuals(model, images())
    assert reservations(removal) == {"3": 3} and worst_error(removal, model) < 1e-12


def test_forms_can_be_mixed_channel_by_channel() -> None:
    """Half of x comes out of a ReLU, half does not."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = conv_bn(3, 4), basic(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.block(torch.cat([torch.relu(x), x], 1))

    model = prepared(Halves())
    removal = remove_residuals(model, images())
    assert removal.blocks[0].form == "free+pair" and removal.blocks[0].reserved == 4 + 2 * 4
    assert worst_error(removal, model) < 1e-12


def saturating(act: type[nn.Module], blocks: int) -> nn.Sequential:
    """Inverted residuals whose hidden activations are large and whose outputs are not, so that errors do not grow by themselves."""

    def block() -> Residual:
        return Residual(
            nn.Sequential(*conv_bn(8, 24, 1), act(), *conv_bn(24, 24, groups=24), act(), *conv_bn(24, 8, 1))
        )

    model = prepared(*conv_bn(3, 16), act(), *conv_bn(16, 8, 1), *(block() for _ in range(blocks)), gain=3.0)
    for module in model.modules():
        if isinstance(module, Residual):
            module.branch[-1].weight *= 0.05
    return model


@pytest.mark.parametrize(("act", "limit"), [(nn.ReLU, 1e-5), (nn.ReLU6, 1e-4)])
@pytest.mark.parametrize("form", few(["auto", "pair"], "auto"))
def test_precision_in_float32(act: type[nn.Module], limit: float, form: str) -> None:
    """Ten blocks, more than 5 % of the activations saturated."""
    model = saturating(act, 10).float()
    x = images(count=4).float() * 3
    shares: list[float] = []
    hooks = [
        module.register_forward_hook(lambda m, args, y: shares.append((args[0] > 6).float().mean().item()))
        for module in model.modules()
        if isinstance(module, act)
    ]
    expected = model(x)
    assert sum(shares) / len(shares) > 0.05
    for hook in hooks:
        hook.remove()
    found = remove_residuals(model, x, form=form).model(x)
    assert (found - expected).abs().max() <= limit * expected.abs().max()


def test_loose_bounds_are_not_paid_for_with_precision() -> None:
    """Bounds a million times the values: a shift would round them away in float32, so auto takes the pair."""
    rule, end = rule_of(nn.ReLU6()), torch.full((2,), 1e6, dtype=torch.float64)
    assert rule is not None
    needed = torch.ones(2, dtype=torch.bool)
    forms = [
        cheapest_code(rule, -end, end, needed, form, size)
        for form, size in (("auto", 1.0), ("auto", 1e5), ("shift", 1.0))
    ]
    assert [sorted(code.forms) for code in forms if isinstance(code, Code)] == [["pair"], ["shift"], ["shift"]]


def test_scales_are_powers_of_two() -> None:
    """So that float32 rounds nothing when a copy is scaled, nor when it is scaled back."""
    rule = rule_of(nn.ReLU6())
    assert rule is not None
    low, high = -torch.rand(50, dtype=torch.float64) * 300, torch.rand(50, dtype=torch.float64) * 300
    for form in ("shift", "pair"):
        code = cheapest_code(rule, low, high, torch.ones(50, dtype=torch.bool), form)
        assert isinstance(code, Code)
        exponent = torch.log2(code.scale.abs())
        assert torch.equal(exponent, exponent.round())
        k = code.channel
        ends = torch.stack([code.scale * low[k] + code.offset, code.scale * high[k] + code.offset])
        assert form == "pair" or (ends.min() >= 0 and ends.max() <= 6)


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.SiLU, nn.ReLU6], ids=act_name)
def test_a_slice_passes_any_activation_when_asked_for(act: type[nn.Module]) -> None:
    """One copy beside the original activation; the result is no chain, so nothing takes this form by itself."""
    branch = nn.Sequential(*conv_bn(3, 6, 1), act(), *conv_bn(6, 6, groups=6), act(), *conv_bn(6, 3, 1))
    model = prepared(*conv_bn(3, 3), Residual(branch))
    removal = remove_residuals(model, images(), form="slice")
    assert removal.blocks[0].form == "free+slice" and removal.blocks[0].reserved == 3
    assert isinstance(removal.model, torch.fx.GraphModule) and worst_error(removal, model) < 1e-12
