"""The least-squares maths: exact where the answer exists, with intercept, for every kernel shape."""

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import rmprune
from rmprune.errors import UnsupportedModel
from rmprune.graph.shapes import record_shapes
from rmprune.pruning.layers import SizedLayer, Weighted, sized_layers
from rmprune.pruning.positions import outputs_at, patches_at, sample_positions
from rmprune.pruning.reconstruct import (
    BLOCK,
    _grouped,
    _Moments,
    _ungrouped,
    least_squares,
    reconstruct,
    reconstruct_checked,
)

CASES = {
    "1x1": nn.Conv2d(6, 4, 1),
    "3x3": nn.Conv2d(6, 4, 3, padding=1),
    "3x3 stride 2 dilated": nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2),
    "grouped": nn.Conv2d(6, 4, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6),
}


def described(conv: nn.Conv2d, x: torch.Tensor) -> SizedLayer:
    model = nn.Sequential(conv)
    return sized_layers(model, x, record_shapes(model, x, Weighted))[0]


def everywhere(layer: SizedLayer, images: int):  # type: ignore[no-untyped-def]
    return sample_positions(images, layer.output_size, 10_000, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CASES)
def test_patches_times_weights_are_the_layers_outputs(name: str) -> None:
    conv, x = CASES[name].double(), torch.randn(3, 6, 7, 6, dtype=torch.float64)
    layer = described(conv, x)
    at = everywhere(layer, 3)
    patches = patches_at(x, layer, at).double()
    w = conv.weight.reshape(conv.groups, conv.out_channels // conv.groups, -1)
    y = torch.einsum("sgd,god->sgo", patches.reshape(len(patches), conv.groups, -1), w).flatten(1) + conv.bias
    torch.testing.assert_close(y.detach(), outputs_at(conv(x), at).double().detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_finds_the_weights_that_made_the_outputs(name: str) -> None:
    """Weights and a large bias are found again from a wrong start, by inputs whose mean is far from zero."""
    conv, x = CASES[name].double(), torch.randn(40, 6, 7, 6, dtype=torch.float64) + 3
    layer = described(conv, x)
    at = everywhere(layer, 40)
    wanted = outputs_at(conv(x) + 5, at).detach()
    weight, bias = reconstruct(torch.zeros_like(conv.weight), patches_at(x, layer, at), wanted, conv.groups, ridge=1e-9)
    torch.testing.assert_close(weight, conv.weight.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias, conv.bias.detach() + 5, rtol=1e-2, atol=1e-2)


def test_without_an_intercept_it_would_fail() -> None:
    """A removed channel that is constant is made up for by the intercept alone: exact with it, far off without."""
    x = torch.randn(500, 4, 1, dtype=torch.float64)
    x[:, 3] = 2.0  # what the pruned channel always was
    w = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    wanted = x[:, :, 0] @ w.T + 1.0
    kept = x[:, :3]
    found, bias = reconstruct(w[:, :3], kept, wanted, 1)
    torch.testing.assert_close(kept[:, :, 0] @ found.T + bias, wanted, rtol=1e-6, atol=1e-6)
    without = torch.linalg.lstsq(kept[:, :, 0], wanted).solution
    assert (kept[:, :, 0] @ without - wanted).abs().mean() > 5


def test_a_correlated_neighbour_takes_over() -> None:
    x = torch.randn(800, 3, 9, dtype=torch.float64)
    x[:, 2] = 0.5 * x[:, 0] - x[:, 1]
    w = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    wanted = x.flatten(1) @ w.flatten(1).T
    found, bias = reconstruct(w[:, :2].contiguous(), x[:, :2], wanted, 1, ridge=1e-9)
    assert found.shape == (5, 2, 3, 3)
    torch.testing.assert_close(x[:, :2].flatten(1) @ found.flatten(1).T + bias, wanted, rtol=1e-5, atol=1e-5)


def test_too_few_samples_leave_the_weights_near_where_they_were() -> None:
    w = torch.randn(4, 50, 1, 1, dtype=torch.float64)
    x = torch.randn(5, 50, 1, dtype=torch.float64)
    wanted = x[:, :, 0] @ w.flatten(1).T
    found, _ = reconstruct(w, x, wanted, 1)
    torch.testing.assert_close(found, w, rtol=1e-6, atol=1e-6)


def noisy(groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights to start from, and several blocks of patches and outputs, float64, with means far from zero."""
    torch.manual_seed(0)
    x = torch.randn(3 * BLOCK, 6, 9, dtype=torch.float64) * torch.rand(6, 1) + 3
    w = torch.randn(12, 6 // groups, 3, 3, dtype=torch.float64)
    rows = w.reshape(groups, 12 // groups, -1)
    y = torch.einsum("sgd,ged->sge", x.reshape(len(x), groups, -1), rows).flatten(1)
    return w + 0.5 * torch.randn_like(w), x, y + y.std() * torch.randn_like(y) + 7


@pytest.mark.parametrize("groups", [1, 6])
def test_sums_in_float32_give_what_float64_gives(groups: int) -> None:
    """To 1e-5 of the largest weight, and of the intercepts."""
    data = noisy(groups)
    for single, exact in zip(
        reconstruct_checked(*(t.float() for t in data), groups), reconstruct_checked(*data, groups), strict=True
    ):
        assert float((single - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert float((single - data[2].mean(0)).abs().max()) > 1  # the intercept is no mean


@pytest.mark.parametrize("groups", [1, 6])
def test_moments_of_two_parts_are_those_of_all_and_know_the_error(groups: int) -> None:
    weight, x, y = noisy(groups)
    w, first = _grouped(weight, groups), BLOCK + 7
    parts = [_Moments.of(w, x[some], y[some], groups) for some in (slice(first), slice(first, None))]
    whole = _Moments.of(w, x, y, groups)
    for found, expected in zip(vars(parts[0].joined(parts[1])).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-9, atol=1e-6)
    more, bias = parts[0].solve(1e-2)
    fitted, shift = _ungrouped(w, more, bias, weight)
    rows = x[first:].reshape(len(x) - first, groups, -1)
    out = torch.einsum("sgd,ged->sge", rows, fitted.reshape(groups, 12 // groups, -1)).flatten(1) + shift
    assert parts[1].error(more, bias) == pytest.approx(float((out - y[first:]).square().sum()), rel=1e-9)


def test_positions_cover_small_maps_and_sample_large_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    small = sample_positions(2, (2, 2), 9, generator)
    assert sorted(zip(small.image.tolist(), small.row.tolist(), small.column.tolist(), strict=True)) == [
        (n, i, j) for n in range(2) for i in range(2) for j in range(2)
    ]
    large = sample_positions(3, (5, 7), 4, generator)
    assert len(large.image) == 12
    assert int(large.row.max()) < 5
    assert int(large.column.max()) < 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_stays_in_its_number_format(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.ReLU())
    net, x = nn.Sequential(net, nn.Flatten(), nn.Linear(64, 2)).to(dtype).eval(), torch.randn(16, 2, 6, 6, dtype=dtype)
    batches = [(x, torch.arange(16) % 2)]
    smaller = rmprune.prune(
        net, x, budget=rmprune.Budget(ratio=0.4), importance="magnitude", data=batches, reconstruct=True
    )
    assert {tensor.dtype for tensor in smaller.state_dict().values()} - {torch.int64} == {dtype}
    assert smaller(x).isfinite().all()


def test_networks_of_vectors_are_fitted() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 5)
    data = [(x, torch.arange(64) % 2)]
    cut, fitted = (
        rmprune.prune(net, x, budget=rmprune.Budget(ratio=0.5), importance="magnitude", data=data, reconstruct=fit)
        for fit in (False, True)
    )
    assert (fitted(x) - net(x)).square().mean() < (cut(x) - net(x)).square().mean()


def test_norms_without_running_statistics_are_refused_by_name() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    net, x = nn.Sequential(nn.Conv2d(2, 4, 1), norm, nn.Conv2d(4, 2, 1), nn.Flatten()).eval(), torch.randn(8, 2, 2, 2)
    data = [(x, torch.arange(8) % 2)]
    with pytest.raises(UnsupportedModel, match=r"^1: .*running statistics; --no-reconstruct"):
        rmprune.prune(net, x, budget=rmprune.Budget(ratio=0.5), importance="magnitude", data=data, reconstruct=True)


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, FrozenBatchNorm2d])
def test_norms_of_several_processes_and_frozen_ones_are_fitted_like_others(kind: type[nn.Module]) -> None:
    fitted = []
    x = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    data = [(x, torch.arange(32) % 2)]
    for norm in (nn.BatchNorm2d, kind):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False), norm(8), nn.ReLU())
        net = nn.Sequential(*layers, nn.Conv2d(8, 2, 4), nn.Flatten()).eval()
        for at in (1, 4):
            net[at].running_mean.uniform_(-1, 1)
            net[at].running_var.uniform_(0.5, 2)
        fitted.append(
            rmprune.prune(net, x, budget=rmprune.Budget(ratio=0.4), importance="magnitude", data=data, reconstruct=True)
        )
    own, other = (network.state_dict() for network in fitted)
    assert type(fitted[1][1]) is kind
    assert all(torch.allclose(value, own[name], atol=1e-6) for name, value in other.items())


@pytest.mark.parametrize(("dilation", "padding", "mean"), [(1, 1, 0.0), (2, 1, 0.0), (1, 0, 1000.0)])
def test_least_squares_finds_the_convolution_that_made_the_maps(dilation: int, padding: int, mean: float) -> None:
    torch.manual_seed(0)
    made, read = nn.Conv2d(5, 7, 3, 2, padding, dilation), torch.randn(128, 5, 11, 9) + mean
    with torch.no_grad():
        wanted = made(read)
        weight, bias, error = least_squares(made, read, wanted, torch.Generator().manual_seed(0))
        off = nn.functional.conv2d(read, weight, bias, 2, padding, dilation) - wanted
    assert (weight - made.weight).abs().max() < 2e-3 and off.abs().max() < 2e-2
    assert abs(error) < 1e-4 * float(wanted.var((0, 2, 3)).sum())
