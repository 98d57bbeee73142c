"""Traps for RM: code that reads like a removable block and is not, or only in another way. Exact or refused, each one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from rmprune.errors import UnsupportedModel
from rmprune.graph.calls import DROPOUT_CALLS, TORCH_DROPOUT_CALLS
from rmprune.removal import remove_residuals


class Trap(nn.Module):
    """Two 3x3 convolutions with batch norm (`a`, `b`), a stem, and a forward of its own."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.down = nn.Conv2d(4, 4, 1, stride=2)
        self.relu_, self.drop, self.same = nn.ReLU(inplace=True), nn.Dropout(), nn.Identity()
        self.drop3d = nn.Dropout3d()
        self.gain = nn.Parameter(torch.rand(1, 4, 1, 1))
        self.code = forward
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, self.stem(x))


def swapped(first: Tensor, second: Tensor) -> Tensor:
    """first.__iadd__(second), as a call that returns."""
    first += second
    return first


TRAPS: dict[str, Callable[[Trap, Tensor], Tensor]] = {
    # in place on the fork, directly or through an alias: the shortcut carries the new value
    "relu_ on the fork": lambda s, x: s.b(s.relu_(s.a(s.relu_(x)))) + x,
    "relu_ through Identity": lambda s, x: s.b(F.relu(s.a(s.relu_(s.same(x))))) + x,
    "relu_ through Dropout": lambda s, x: s.b(F.relu(s.a(s.relu_(s.drop(x))))) + x,
    "relu_ through Dropout3d": lambda s, x: s.b(F.relu(s.a(s.relu_(s.drop3d(x.unsqueeze(2)).squeeze(2))))) + x,
    "relu_ through view": lambda s, x: s.b(F.relu(s.a(x.view(x.shape).relu_()))) + x,
    "relu_ through contiguous": lambda s, x: s.b(F.relu(s.a(x.contiguous().relu_()))) + x,
    "relu_ on a slice": lambda s, x: s.b(F.relu(s.a(torch.cat([x[:, :2].relu_(), x[:, 2:]], 1)))) + x,
    "relu_ on a chunk": lambda s, x: s.b(F.relu(s.a(torch.cat([x.chunk(2, 1)[0].relu_(), x[:, 2:]], 1)))) + x,
    "relu_ on a clone": lambda s, x: s.b(F.relu(s.a(x.clone().relu_()))) + x,
    "clamp_ on the fork": lambda s, x: s.b(F.relu(s.a(x.clamp_(0, 6)))) + x,
    "add_ into the fork": lambda s, x: F.relu(x.add_(s.b(F.relu(s.a(x))))) + x,
    "+= into the fork": lambda s, x: F.relu(swapped(x, s.b(F.relu(s.a(F.relu(x)))))) + x,
    "mul_ on the branch": lambda s, x: s.b(F.relu(s.a(x))).mul_(2) + x,
    # activations in one-sided and functional forms
    "clamp(min=0)": lambda s, x: s.b(s.a(x.clamp(min=0)).clamp(min=0)) + x.clamp(min=0),
    "clamp(0)": lambda s, x: s.b(s.a(x).clamp(0)) + x,
    "torch.clamp(max=2)": lambda s, x: s.b(torch.clamp(s.a(x), max=2)) + x,
    "clamp_min": lambda s, x: s.b(s.a(x).clamp_min(0)) + x,
    "maximum": lambda s, x: s.b(torch.maximum(s.a(x), torch.zeros(()))) + x,
    "threshold": lambda s, x: s.b(F.threshold(s.a(x), 0.5, 1.0)) + x,
    "abs": lambda s, x: s.b(s.a(x).abs()) + x,
    "leaky_relu(-1)": lambda s, x: s.b(F.leaky_relu(s.a(x), -1.0)) + x,
    "leaky_relu(-0.999)": lambda s, x: s.b(F.leaky_relu(s.a(x), -0.999)) + x,
    "elu(alpha=-2)": lambda s, x: F.relu(s.b(F.elu(s.a(x), -2.0)) + F.elu(x, -2.0)),
    "softplus(beta=-1)": lambda s, x: s.b(F.softplus(s.a(x), -1.0)) + x,
    "softplus": lambda s, x: s.b(F.softplus(s.a(x))) + x,
    "hardtanh(0, 0)": lambda s, x: s.b(F.hardtanh(s.a(x), 0.0, 0.0)) + x,
    "relu6 then mish": lambda s, x: s.b(F.relu6(s.a(F.mish(F.relu6(x))))) + F.mish(F.relu6(x)),
    "rrelu": lambda s, x: s.b(F.rrelu(s.a(x), 0.1, 0.3, False)) + x,
    # additions that are something else
    "alpha": lambda s, x: torch.add(s.b(F.relu(s.a(F.relu(x)))), F.relu(x), alpha=3),
    "difference": lambda s, x: F.relu(s.b(F.relu(s.a(x))) - x),
    "norm alone": lambda s, x: s.a(F.relu(s.a[1](F.relu(x)) + F.relu(x))),
    "x + x": lambda s, x: F.relu(x + x),
    "branch twice": lambda s, x: (lambda y: F.relu(y + y + x))(s.b(F.relu(s.a(x)))),
    "same block twice": lambda s, x: (lambda f: f(f(F.relu(x))))(lambda y: F.relu(s.b(F.relu(s.a(y))) + y)),
    "same convolution twice": lambda s, x: F.relu(s.a(F.relu(s.a(F.relu(x)))) + F.relu(x)),
    "broadcast": lambda s, x: F.relu(s.b(F.relu(s.a(x))) + x.mean((2, 3), keepdim=True)),
    "constant": lambda s, x: F.relu(s.b(F.relu(s.a(x))) + s.gain),
    "three ways": lambda s, x: F.relu(s.b(F.relu(s.a(F.relu(x)))) + s.a(F.relu(x)) + F.relu(x)),
    "inner read outside": lambda s, x: (lambda y: F.relu(s.b(y) + x) + y)(F.relu(s.a(x))),
    "fork read outside": lambda s, x: (lambda y: F.relu(s.b(F.relu(s.a(y))) + y) * y)(F.relu(x)),
    "layer scale": lambda s, x: F.relu(s.gain * s.b(F.relu(s.a(F.relu(x)))) + F.relu(x)),
    "spatial scale": lambda s, x: F.relu(s.b(F.relu(s.a(F.relu(x)))) * x.mean(1, keepdim=True) + F.relu(x)),
    "halved": lambda s, x: F.relu((s.b(F.relu(s.a(F.relu(x)))) + F.relu(x)) / 2),
    "flipped": lambda s, x: F.relu(s.b(F.relu(s.a(F.relu(x)))) + F.relu(x).flip(1)),
    "rolled": lambda s, x: F.relu(s.b(F.relu(s.a(F.relu(x)))) + F.relu(x).roll(1, 2)),
    "transposed": lambda s, x: F.relu(s.b(F.relu(s.a(F.relu(x)))) + F.relu(x).transpose(2, 3)),
    # geometry
    "subsampled": lambda s, x: (lambda y: s.down(F.relu(s.a(y))) + y[:, :, ::2, ::2])(F.relu(x)),
    "subsampled from 1": lambda s, x: (lambda y: s.down(F.relu(s.a(y)))[:, :, :2, :2] + y[:, :, 1:5:2, 1:5:2])(
        F.relu(x)
    ),
    "average pool, ceil": lambda s, x: (lambda y: s.down(F.relu(s.a(y))) + F.avg_pool2d(y, 2, 2, ceil_mode=True))(
        F.relu(x)
    ),
    "max pool": lambda s, x: (lambda y: s.down(F.relu(s.a(y))) + F.max_pool2d(y, 1, 2))(F.relu(x)),
    "channels padded": lambda s, x: (lambda y: s.b(F.relu(s.a(y))) + F.pad(y[:, :3], (0, 0, 0, 0, 0, 1)))(F.relu(x)),
    "padded by hand": lambda s, x: F.relu(
        s.b(F.pad(F.relu(s.a(F.relu(x))), (1, 1, 1, 1)))[:, :, 1:-1, 1:-1] + F.relu(x)
    ),
    "padded with ones": lambda s, x: F.relu(
        F.conv2d(F.pad(F.relu(x), (1, 1, 1, 1), value=1.0), s.a[0].weight) + F.relu(x)
    ),
    "shuffled": lambda s, x: F.relu(s.b(F.channel_shuffle(F.relu(s.a(F.relu(x))), 2)) + F.relu(x)),
    "bicubic": lambda s, x: F.relu6(s.b(F.relu6(s.a(F.interpolate(F.relu6(x), (7, 7), mode="bicubic")))) + F.relu6(x)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_exact_or_refused(name: str) -> None:
    torch.manual_seed(1)
    model = Trap(TRAPS[name]).double().eval().requires_grad_(False)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    check(model, x)


NAMES: dict[str, Callable[[Tensor], Tensor]] = {  # other names for a value, which share its memory
    **{
        call.__name__: lambda x, call=call: call(x, training=False) for call in DROPOUT_CALLS if call is not F.dropout1d
    },  # type: ignore[misc]
    **{f"torch.{call.__name__}": lambda x, call=call: call(x, 0.5, False) for call in TORCH_DROPOUT_CALLS},  # type: ignore[misc]
    "stochastic_depth": lambda x: stochastic_depth(x, 0.5, "batch", False),
    "positive": torch.positive,
    "type_as": lambda x: x.type_as(x),
    "cpu": lambda x: x.cpu(),
    "swapped twice": lambda x: torch.swapaxes(torch.swapaxes(x, 2, 3), 2, 3),
    "moved": lambda x: torch.movedim(x, 2, 2),
    "reshape_as": lambda x: x.reshape_as(x),
    "unflatten": lambda x: torch.unflatten(x, 0, (-1, 1)).squeeze(1),
    "broadcast_to": lambda x: torch.broadcast_to(x, x.shape),
    "select": lambda x: torch.select(x.unsqueeze(0), 0, 0),
    "tensor_split": lambda x: x.tensor_split(1)[0],
    "data": lambda x: x.data,
    "mT": lambda x: x.mT.mT,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_change_under_another_name_is_seen_or_refused(name: str) -> None:
    torch.manual_seed(1)
    model = Trap(lambda s, x: s.b(F.relu(s.a(NAMES[name](x).relu_()))) + x).double().eval().requires_grad_(False)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    assert NAMES[name](x).data_ptr() == x.data_ptr()
    if "dropout" in name.lower():  # as it is outside of training it stands in nobody's way
        assert len(remove_residuals(model, x).removed) == 1
    check(model, x)


def check(model: nn.Module, x: Tensor) -> None:
    try:
        removal = remove_residuals(model, x)
    except UnsupportedModel:  # NotEquivalent would be a wrong rewrite that only the call's own check caught
        return
    for scale in (1, 30):
        fresh = scale * torch.randn(3, *x.shape[1:], dtype=torch.float64)
        expected = model(fresh.clone())
        assert (removal.model(fresh.clone()) - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_hooks_that_change_the_output_are_honoured_or_refused() -> None:
    torch.manual_seed(1)
    model = Trap(lambda s, x: F.relu(s.b(F.relu(s.a(F.relu(x)))) + F.relu(x))).double().eval()
    model.b.register_forward_hook(lambda module, args, output: output * 2)
    check(model, torch.randn(2, 3, 7, 7, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("parametrized", [False, True])
def test_weights_computed_from_others_are_honoured_or_refused(norm: str, parametrized: bool) -> None:
    torch.manual_seed(1)
    model = Trap(lambda s, x: F.relu(s.b(F.relu(s.a(F.relu(x)))) + F.relu(x))).double().eval()
    getattr(nn.utils.parametrizations if parametrized else nn.utils, norm)(model.a[0])
    for parameter in model.a[0].parameters():
        parameter.data *= 1.5  # the cached weight is stale now
    check(model, torch.randn(2, 3, 7, 7, dtype=torch.float64))


def test_layers_with_a_forward_of_their_own_are_not_taken_for_stock_ones() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    class Identity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    torch.manual_seed(1)
    model = Trap(lambda s, x: F.relu(s.b(s.same(F.relu(s.a(F.relu(x))))) + F.relu(x))).double()
    model.a[0], model.same = Standardised(4, 4, 3, padding=1).double(), Identity()
    check(model.eval(), torch.randn(2, 3, 7, 7, dtype=torch.float64))
