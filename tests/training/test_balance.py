"""Balancing: the function stays in both modes, and no row runs ahead of the others."""

import copy
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
from rmprune.training.balance import AHEAD, _pairs, balance
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
    """Convolutions that must not be scaled: read twice, called twice, with shared weights, standardised, without a norm, with weights that
    a function reads as well, before a norm with a hook, before norms that share a statistic."""

    def __init__(self) -> None:
        super().__init__()
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
        self.twin_norms[1].running_var = self.twin_norms[0].running_var
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
        return self.head(self.last(self.standardised(x)).relu().mean((2, 3)))


class Standardised(nn.Conv2d):
    """Takes the length of its rows out by itself."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        weight = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


def test_what_scaling_would_change_stays(batches: list[Batch]) -> None:
    torch.manual_seed(0)
    net = lopsided(randomise(Odd())).double().eval()
    balanced = balance(net, batches)
    x = batches[0][0]
    torch.testing.assert_close(balanced(x), net(x), rtol=0, atol=1e-12)
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), balanced.state_dict().values(), strict=True)
    )


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
        data = [(x[:1], y[:1]) for x, y in batches]
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
    single = [layer for _ in range(3) for layer in (conv(16, 16, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU())]
    net = small(conv(1, 16), nn.BatchNorm2d(16), nn.ReLU(), *single, conv(16, 8), nn.BatchNorm2d(8), width=8)
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

    balanced = balance(net, WithLoss(batches, no_gradient))
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
