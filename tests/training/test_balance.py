"""Balancing: the function stays in both modes, and no row runs ahead of the others."""

import copy
import math
import types
from typing import Any

import pytest
import torch
from marks import few
from pruning_nets import conv, randomise
from slim_runs import inverted
from torch import Tensor, nn

from rmprune import Budget, plan_removal, prune
from rmprune.data.batches import WithLoss
from rmprune.models import create
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.training.balance import AHEAD, BATCHES, _gradients, _pairs, balance
from rmprune.training.recentre import recentre

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(32, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(32) % 4) for _ in range(3)
    ]


def lopsided(model: nn.Module) -> nn.Module:
    """With rows of very unequal lengths before batch norms, which know of it."""
    generator, before = torch.Generator().manual_seed(1), None
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            assert module.running_mean is not None and module.running_var is not None
            factor = 10 ** (-2 * torch.rand(module.num_features, generator=generator).to(before.weight))
            before.weight.data *= factor.view(-1, 1, 1, 1)
            module.running_mean *= factor
            module.running_var *= factor.square()
        before = module
    return model


@pytest.fixture(scope="module", params=few(["remove", "merge", "fuse"], "fuse"))
def fitted(request: pytest.FixtureRequest, batches: list[Batch]) -> nn.Module:
    """A ResNet without residuals or of merged blocks, inverted residuals in MobileNetV1's form; cut once, fitted, re-centred."""
    torch.manual_seed(0)
    model = randomise(
        inverted() if request.param == "fuse" else create("resnet8", num_classes=4, in_channels=1, width=8)
    ).eval()
    x = torch.cat([x for x, _ in batches]).float()
    choices = {report.name: request.param for report in plan_removal(model, x[:2])}
    plain, _ = carry_out_blocks(model, choices, lambda count: x[:count])
    data = [(x, torch.arange(len(x)) % 4)]
    cut = prune(plain, x[:2], budget=Budget(ratio=0.5), data=data, reconstruct=True).double()
    return recentre(cut, [x.double()])


def turning(model: nn.Module, batches: list[Batch]) -> Tensor:
    """[rows]: gradient relative to length of the rows of all convolutions that a batch norm follows, in training mode; those that move."""
    model, before = copy.deepcopy(model).train(), None
    convs = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            convs.append(before)
        before = module
    squares = []
    for x, y in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        squares.append(torch.cat([_rows(conv.weight.grad) for conv in convs]).square())
    relative = torch.stack(squares).mean(0).sqrt() / torch.cat([_rows(conv.weight.detach()) for conv in convs])
    return relative[relative > 1e-6]  # a row of one weight does not turn


def _rows(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight.flatten(1).norm(dim=1).clamp_min(1e-12)


def test_the_function_stays_in_both_modes(fitted: nn.Module, batches: list[Batch]) -> None:
    fitted = recentre(lopsided(copy.deepcopy(fitted)), [x for x, _ in batches])
    weights, x = copy.deepcopy(fitted.state_dict()), torch.cat([x for x, _ in batches])
    balanced = balance(fitted, batches)
    assert any(not torch.equal(value, weights[name]) for name, value in balanced.state_dict().items())
    assert all(torch.equal(value, weights[name]) for name, value in fitted.state_dict().items())
    assert not balanced.training
    with torch.no_grad():
        before, after = fitted(x), balanced(x)
        assert float((after - before).abs().max() / before.std()) < 1e-12
        before, after = copy.deepcopy(fitted).train()(x), copy.deepcopy(balanced).train()(x)
        assert (
            float((after - before).abs().max() / before.std()) < 1e-9
        )  # of all images, whose statistics the norms have


def test_no_row_runs_ahead(fitted: nn.Module, batches: list[Batch]) -> None:
    fitted = recentre(lopsided(copy.deepcopy(fitted)), [x for x, _ in batches])
    before, after = (turning(model, batches) for model in (fitted, balance(fitted, batches)))
    assert before.max() > 50 * before.median()
    assert after.max() < 1.5 * AHEAD * after.median()  # the rows before moved in the last round


def test_a_network_in_balance_stays_as_it_is_to_the_last_bit(batches: list[Batch]) -> None:
    torch.manual_seed(0)
    net = recentre(
        randomise(create("resnet8", num_classes=4, in_channels=1, width=8)).double().eval(), [x for x, _ in batches]
    )
    assert turning(net, batches).max() < AHEAD * turning(net, batches).median()
    balanced = balance(net, batches).state_dict()
    assert all(torch.equal(value, balanced[name]) for name, value in net.state_dict().items())


class Odd(nn.Module):
    """Convolutions that must not be scaled: read twice, called twice, with shared weights, standardised, with a forward of its own,
    transposed, without a norm, with weights that a function reads as well, before a norm with a hook, before norms that share a statistic,
    before one without a scale or without statistics. Only `good` may be."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.good_norm = conv(4, 4), nn.BatchNorm2d(4)
        self.clamped, self.clamped_norm = conv(4, 4), nn.BatchNorm2d(4)
        self.clamped.forward = types.MethodType(_clamped, self.clamped)
        self.transposed, self.transposed_norm = nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)
        self.plain_conv, self.plain_norm = conv(4, 4), nn.BatchNorm2d(4, affine=False)
        self.fresh, self.fresh_norm = conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False)
        self.twice_read, self.norm = conv(1, 4), nn.BatchNorm2d(4)
        self.twice_called, self.other = conv(4, 4), nn.BatchNorm2d(4)
        self.tied, self.tied_norm = conv(4, 4), nn.BatchNorm2d(4)
        self.partner = conv(4, 4)
        self.partner.weight = self.tied.weight
        self.standardised, self.last = Standardised(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.written, self.written_norm = conv(4, 4), nn.BatchNorm2d(4)
        self.listened, self.listened_norm = conv(4, 4), nn.BatchNorm2d(4)
        self.listened_norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].clamp(-0.01, 0.01),))
        self.twins = nn.ModuleList(conv(4, 4) for _ in range(2))
        self.twin_norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.twice_read(x)
        x = self.norm(first).relu() + first
        x = self.other(self.twice_called(self.twice_called(x).relu())).relu()
        x = self.partner(self.tied_norm(self.tied(x)).relu()).relu()
        x = self.written_norm(self.written(x)).relu() + nn.functional.conv2d(x, self.written.weight, padding=1)
        x = self.listened_norm(self.listened(x)).relu()
        for twin, norm in zip(self.twins, self.twin_norms, strict=True):
            x = norm(twin(x)).relu()
        x = self.clamped_norm(self.clamped(x)).relu()
        x = self.transposed_norm(self.transposed(x)).relu()
        x = self.plain_norm(self.plain_conv(self.good_norm(self.good(x)).relu())).relu()
        x = self.fresh_norm(self.fresh(x)).relu()
        return self.head(self.last(self.standardised(x)).relu().mean((2, 3)))


def _clamped(self: nn.Conv2d, x: Tensor) -> Tensor:
    return nn.functional.conv2d(x, self.weight.clamp(-0.1, 0.1), padding=1)


class Standardised(nn.Conv2d):
    """Takes the length of its rows out by itself."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        weight = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


def test_only_what_scaling_does_not_change_is_scaled(batches: list[Batch]) -> None:
    torch.manual_seed(0)
    net = randomise_all(Odd()).double().eval()  # it gives each norm statistics of its own
    net.get_submodule("twin_norms.1").running_var = net.get_buffer("twin_norms.0.running_var")
    assert [conv for conv, _ in _pairs(net)] == [net.good]
    with torch.no_grad():
        shorten_row(net.good, net.good_norm, 1, 1e-3)
    balanced, x = balance(net, batches), batches[0][0]
    assert not torch.equal(balanced.get_parameter("good.weight"), net.good.weight)
    torch.testing.assert_close(balanced(x), net(x), rtol=0, atol=1e-10)
    for name, value in net.state_dict().items():
        assert name.startswith("good") or torch.equal(value, balanced.state_dict()[name])


def randomise_all(model: nn.Module) -> nn.Module:
    """Also where there is no scale or no statistic."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.running_mean is not None:
            randomise(module)
    return model


def shorten_row(conv: nn.Conv2d, norm: nn.BatchNorm2d, row: int, factor: float) -> None:
    """One row, and what its norm knows of it."""
    assert norm.running_mean is not None and norm.running_var is not None
    conv.weight[row] *= factor
    if conv.bias is not None:
        conv.bias[row] *= factor
    norm.running_mean[row] *= factor
    norm.running_var[row] *= factor**2


@pytest.mark.parametrize("factor", [2.0**-7, 2.0**-30])
def test_one_short_row_alone_is_lengthened_by_a_power_of_two(batches: list[Batch], factor: float) -> None:
    """A convolution with a bias, before a norm with a large `eps`, which the norm's scale makes up for."""
    torch.manual_seed(0)
    net = small(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, eps=1e-16), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), width=8)
    net = recentre(net, [x for x, _ in batches])
    first, norm = net.get_submodule("0"), net.get_submodule("1")
    assert isinstance(first, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        shorten_row(first, norm, 3, factor)
    norm.eps = 1e-4 * factor**2
    balanced, x = balance(net, batches), batches[0][0]
    assert float((balanced(x) - net(x)).detach().abs().max()) < 1e-12
    ratio = balanced.get_parameter("0.weight").detach() / first.weight.detach()
    doublings = ratio[3].log2()
    assert torch.equal(doublings, doublings.round()) and doublings.unique().numel() == 1
    assert abs(float(doublings.flatten()[0]) - min(-math.log2(factor), 16)) <= 2  # at most 8 a pass
    assert torch.equal(balanced.get_parameter("0.bias")[3], net.get_parameter("0.bias")[3] * ratio[3, 0, 0, 0])
    others = [row for row in range(8) if row != 3]
    for name, value in net.state_dict().items():
        own = balanced.state_dict()[name]
        assert torch.equal(own[others], value[others]) if name.startswith(("0.", "1.")) and own.dim() else True
        assert name.startswith(("0.", "1.")) or torch.equal(own, value)


def test_gradients_are_those_of_batch_norms_in_training_mode_and_all_else_in_eval_mode(batches: list[Batch]) -> None:
    """Of few batches; statistics, modes and the state of the random numbers are left as they were."""
    torch.manual_seed(0)
    net = small(conv(1, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), conv(8, 8), nn.BatchNorm2d(8), width=8)
    pairs, seen = list(_pairs(net)), 0
    assert len(pairs) == 2
    kept = copy.deepcopy(net.state_dict())

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal seen
        seen += 1
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    random = torch.get_rng_state()
    found = _gradients(net, pairs, WithLoss(2 * batches, counted))
    assert seen == BATCHES and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert not any(module.training for module in net.modules()) and all(p.grad is None for p in net.parameters())
    copied, squares = copy.deepcopy(net), [torch.zeros(8, dtype=torch.float64) for _ in pairs]
    for module in copied.modules():
        module.train(isinstance(module, nn.BatchNorm2d))
    for x, y in (2 * batches)[:BATCHES]:
        copied.zero_grad()
        nn.functional.cross_entropy(copied(x), y).backward()
        for square, (own, _) in zip(squares, list(_pairs(copied)), strict=True):
            assert own.weight.grad is not None
            square += own.weight.grad.flatten(1).square().sum(1)
    for one, two in zip(found, squares, strict=True):
        torch.testing.assert_close(one, two.sqrt())


@pytest.mark.parametrize("kind", ["frozen", "loss of one's own", "one image", "no gradient"])
def test_unusual_batches_and_networks(batches: list[Batch], kind: str) -> None:
    torch.manual_seed(0)
    net = lopsided(randomise(create("resnet8", num_classes=4, in_channels=1, width=8))).double().eval()
    data: Any = batches
    if kind == "frozen":
        net.get_parameter("conv1.weight").requires_grad_(False)
    elif kind == "loss of one's own":
        data = WithLoss(
            [{"x": x, "y": y} for x, y in batches],
            lambda m, b: nn.functional.mse_loss(m(b["x"]).sum(1), b["y"].double()),
        )
    elif kind == "one image":
        data = [(x[:1, :, :4, :4], y[:1]) for x, y in batches]  # its last maps are a single pixel
    elif kind == "no gradient":
        net.requires_grad_(False)
        net.get_parameter("fc.weight").requires_grad_(True)
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    balanced, x = balance(net, data), batches[0][0]
    assert float((balanced(x) - net(x)).detach().abs().max()) < 1e-10
    for name, p in balanced.named_parameters():
        assert name not in frozen or torch.equal(p, net.get_parameter(name))


def small(*layers: nn.Module, width: int) -> nn.Module:
    ends = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
    return randomise(nn.Sequential(*layers, *ends)).double().eval()


def test_rows_of_one_weight_do_not_set_the_pace(batches: list[Batch]) -> None:
    """Their gradient is what rounding leaves, and most rows here are of that kind."""
    torch.manual_seed(0)
    single = [layer for _ in range(3) for layer in (conv(16, 16, 1, groups=16), nn.BatchNorm2d(16), nn.LeakyReLU(0.5))]
    net = small(conv(1, 16), nn.BatchNorm2d(16), nn.LeakyReLU(0.5), *single, conv(16, 8), nn.BatchNorm2d(8), width=8)
    net = recentre(net, [x for x, _ in batches])
    lengths = [
        _rows(two.weight.detach()) / _rows(one.weight.detach())
        for one, two in zip(net.modules(), balance(net, batches).modules(), strict=True)
        if isinstance(one, nn.Conv2d) and isinstance(two, nn.Conv2d)
    ]
    assert torch.cat(lengths).max() <= 4


def test_rows_of_zeros_and_gradients_without_end_change_nothing(batches: list[Batch]) -> None:
    net = small(conv(1, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), width=8)
    with torch.no_grad():
        net.get_parameter("0.weight")[:2] = 0
    balanced = balance(recentre(net, [x for x, _ in batches]), batches)
    again = recentre(net, [x for x, _ in batches])
    assert torch.equal(balanced.get_parameter("1.weight")[:2], again.get_parameter("1.weight")[:2])

    def no_gradient(model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(batch[0])
        return nn.functional.cross_entropy(outputs, batch[1]) + (0 * outputs).sum().sqrt()

    def one_without_end(model: nn.Module, batch: Batch) -> Tensor:
        row = model.get_parameter("0.weight")[5]
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + (row - row.detach()).sum().sqrt()

    for loss in (no_gradient, one_without_end):
        balanced = balance(net, WithLoss(batches, loss))
        assert all(
            torch.equal(a, b) for a, b in zip(net.state_dict().values(), balanced.state_dict().values(), strict=True)
        )


def test_norms_that_wait_for_other_processes_are_not_run_in_training_mode() -> None:
    net = small(conv(1, 8), nn.SyncBatchNorm(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), width=8)
    assert [norm for _, norm in _pairs(net)] == [net.get_submodule("4")]


def test_a_variance_that_has_no_room_to_grow_stays(batches: list[Batch]) -> None:
    net = small(conv(1, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), width=8).float()
    with torch.no_grad():
        net.get_parameter("0.weight")[0] *= 1e-3
        net.get_buffer("1.running_var")[0] = 1e38
    balanced, x = balance(net, batches), batches[0][0].float()
    assert all(value.isfinite().all() for value in balanced.state_dict().values())
    torch.testing.assert_close(balanced(x), net(x))
