"""Calls of functions are the layers they stand for: a network written with them becomes stock modules, equal in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from removal_nets import Residual, basic, conv, conv_bn, images, prepared, worst_error
from torch import Tensor, nn

from rmprune.pruning import Budget, prune
from rmprune.removal import remove_residuals


class Written(nn.Module):
    """A residual block and a head that hold their parameters themselves and call functions."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.last = conv(3, 6), conv(6, 6), nn.BatchNorm2d(6), nn.Linear(6 * 16, 4)
        self.slope = nn.Parameter(torch.rand(6) + 0.5)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.conv2d(x, self.first.weight, self.first.bias, padding=1)
        norm = self.second
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        y = F.prelu(F.relu(y + x), self.slope)
        return F.linear(self.flatten(F.avg_pool2d(y, 2)), self.last.weight, self.last.bias)


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(x.size()[0], -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: torch.flatten(x, 1),
    ],
)
def test_functions_become_stock_modules(flatten: Callable[[Tensor], Tensor]) -> None:
    model, x = prepared(Written(flatten)), images()
    removal = remove_residuals(model, x)
    kinds = {type(module) for module in removal.model}
    assert type(removal.model) is nn.Sequential and {nn.PReLU, nn.Linear, nn.Flatten, nn.AvgPool2d} <= kinds | {
        nn.Conv2d
    }
    assert worst_error(removal, model) < 1e-12


class Called(nn.Module):
    """A residual block and a call of its map with that of the stem, which both follow."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.block, self.head, self.call = conv(3, 6), basic(), conv(6, 4), call

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        return self.head(self.call(self.block(y), y))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: x * y.mean((2, 3), keepdims=True),
        lambda x, y: x * torch.mean(input=y, axis=(2, 3), keepdims=True),
        lambda x, y: x * torch.mean(y, (2, 3), dtype=torch.float64)[:, :, None, None],
        lambda x, y: x * torch.sum(y, axis=(2, 3), keepdims=True),
        lambda x, y: torch.concat([x, y], axis=1)[:, 3:9],
        lambda x, y: torch.mul(x, x2=y),
        lambda x, y: torch.prelu(x, torch.sigmoid(y.mean((0, 2, 3)))),
        lambda x, y: F.scaled_dot_product_attention(value=x, key=y, query=x),
    ],
)
def test_arguments_by_any_name_that_torch_takes(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = prepared(Called(call))
    assert worst_error(remove_residuals(model, images()), model) < 1e-12
    pruned = prune(model, images(), importance="magnitude", budget=Budget(ratio=0.6))
    assert pruned.rmprune_facts["cut_error"] < 1e-12


@pytest.mark.parametrize("call", [lambda s, x: x.prelu(s), lambda s, x: torch.prelu(x, weight=s), F.prelu])
def test_slopes_of_channels_are_read_however_they_are_called(call: Callable[..., Tensor]) -> None:
    class Sloped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.middle, self.head = conv(3, 6), conv(6, 6), conv(6, 4)
            self.slope = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.middle(torch.relu(self.stem(x)))
            return self.head(call(y, self.slope) if call is F.prelu else call(self.slope, y))

    facts = prune(prepared(Sloped()), images(), importance="magnitude", budget=Budget(ratio=0.6)).rmprune_facts
    assert (
        len(facts["kept"]["0.stem"]) < 6
        and facts["whole"]["0.middle"] == "a free-standing parameter has these channels"
    )


class Shifted(nn.Module):
    """Adds tensors of its own: one that is trained and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.block = basic()
        self.stem, self.trained = conv(3, 6), nn.Parameter(torch.randn(1, 6, 8, 8))
        self.register_buffer("fixed", torch.randn(1, 6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.relu(self.stem(x))) + self.trained + self.fixed


def test_tensors_of_the_network_itself_are_carried_over_as_what_they_are() -> None:
    model, x = prepared(Shifted()), images()
    removal = remove_residuals(model, x)
    assert removal.removed == ["0.block"]
    assert (removal.model(x) - model(x)).abs().max() < 1e-12
    parameters = [p for p in removal.model.parameters() if p.shape == (1, 6, 8, 8)]
    held = [b for b in removal.model.buffers() if b.shape == (1, 6, 8, 8)]
    assert torch.equal(parameters[0], model[0].trained) and torch.equal(held[0], model[0].fixed)
    assert len(parameters) == len(held) == 1


def frozen() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(6)


def with_activation() -> nn.Module:
    return pytest.importorskip("timm").layers.BatchNormAct2d(6)


@pytest.mark.parametrize("norm", [frozen, with_activation, lambda: nn.SyncBatchNorm(6)])
def test_kin_of_batch_norm_are_batch_norms(norm: Callable[[], nn.Module]) -> None:
    odd = norm()
    for tensor, low in ((odd.weight, 0.5), (odd.bias, -0.5), (odd.running_mean, -0.5), (odd.running_var, 0.5)):
        nn.init.uniform_(tensor.data, low, low + 1)
    model = prepared(*conv_bn(3, 6), nn.ReLU(), Residual(nn.Sequential(conv(6, 6), odd, nn.ReLU(), *conv_bn(6, 6))))
    removal = remove_residuals(model, images())
    assert len(removal.removed) == 1 and worst_error(removal, model) < 1e-12


@pytest.mark.parametrize("written", [lambda x: x * (F.relu6(x + 3) / 6), lambda x: x * F.relu6(x + 3) / 6])
def test_hardswish_written_out_is_hardswish(written: Callable[[Tensor], Tensor]) -> None:
    class Spelt(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return written(x)

    model = prepared(*conv_bn(3, 6), Residual(nn.Sequential(conv(6, 6), Spelt(), conv(6, 6))))
    removal = remove_residuals(model, images())
    assert nn.Hardswish in {type(module) for module in removal.model} and worst_error(removal, model) < 1e-12
