"""Provable ranges: no value that any input produces lies outside (RM.md 2)."""

import math

import pytest
import torch
from removal_nets import Residual, basic, conv, conv_bn, images, prepared, worst_error
from torch import Tensor, fx, nn

from rmprune.graph.convolution import from_module
from rmprune.graph.foreign import reference_copy
from rmprune.graph.normalise import normalise
from rmprune.graph.ranges import annotate_ranges, conv_range, observe, range_of, tighten
from rmprune.removal import remove_residuals


class Mixed(nn.Module):
    """Concatenation, pooling, gates, scaling, cropping: everything that ranges pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.last = conv_bn(3, 6, 3, 2), basic(6), conv(12, 4, 3, padding_mode="reflect")
        self.pool, self.mean, self.gate = (
            nn.MaxPool2d(2, 1),
            nn.AvgPool2d(3, 1, 1),
            nn.Sequential(conv(6, 6, 1), nn.Sigmoid()),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Hardtanh(-0.2, 0.3), nn.Linear(3, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(nn.functional.relu6(self.stem(x)))
        z = y * self.gate(y)
        both = torch.cat([self.mean(0.5 * z), nn.functional.silu(y)], 1)
        return self.head(self.last(self.pool(both))[:, :, ::2, ::2])


@pytest.mark.parametrize("limits", [(-math.inf, math.inf), (0.0, 1.0), (-2.0, 0.5)])
def test_no_value_lies_outside(limits: tuple[float, float]) -> None:
    for seed in range(3):
        model = prepared(Mixed(), seed=seed, gain=2.0)
        x = 20 * torch.randn(16, 3, 9, 9, dtype=torch.float64).clamp(-5, 5)
        x = x.clamp(*limits)
        network = normalise(reference_copy(model), (x,))
        annotate_ranges(network, limits)
        observe(network, (x,))
        bounded = 0
        for node in network.graph.nodes:
            if "seen" in node.meta:
                (low, high), (least, most) = range_of(node), node.meta["seen"]
                assert (least >= low).all() and (most <= high).all(), (node, least, low, most, high)
                assert not torch.isnan(low).any() and not torch.isnan(high).any()
                bounded += bool(torch.isfinite(low).all() and torch.isfinite(high).all())
        assert bounded > (10 if math.isfinite(limits[0]) else 4)


def test_the_bounds_are_reached() -> None:
    """b + sum of max(w low, w high): some input in the box attains it, padding counted as 0."""
    module = conv(2, 3).double()
    low, high = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([3.0, 0.5], dtype=torch.float64)
    found = from_module(module, 2)
    bottom, top = conv_range(found, low, high)
    weight = module.weight.detach()
    for row in range(3):
        best = torch.where(weight[row] > 0, high[:, None, None], low[:, None, None])
        x = best[None].clone()
        inside = module(x)[0, row, 1, 1].item()
        assert inside <= top[row] + 1e-12
        corner = x.clone()
        corner[0, :, 0], corner[0, :, :, 0] = 0, 0
        assert (nn.functional.conv2d(corner, weight[row : row + 1], module.bias.detach()[row : row + 1])).item() <= top[
            row
        ] + 1e-12
    assert (bottom < top).all()


def test_infinite_ends_give_no_nan() -> None:
    module = conv(3, 4, 1).double()
    with torch.no_grad():
        module.weight[:] = torch.tensor([[1.0, 0, 0], [0, -1, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.float64)[
            :, :, None, None
        ]
        module.bias[:] = 2.0
    found = from_module(module, 3)
    inf = math.inf
    low, high = conv_range(found, torch.tensor([0, -inf, -inf]).double(), torch.tensor([inf, 1.0, inf]).double())
    assert low[:2].tolist() == [2.0, 1.0] and high[:2].tolist() == [inf, inf]
    assert low[3] == high[3] == 2.0 and high[2] == inf


def test_calibration_widens_what_it_saw() -> None:
    model = prepared(Residual(nn.Sequential(*conv_bn(3, 4), nn.ReLU(), *conv_bn(4, 3))))
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    network = normalise(reference_copy(model), (x,))
    annotate_ranges(network)
    observe(network, (x,))
    tighten(network, 0.5)
    node = next(n for n in network.graph.nodes if n.op == "placeholder")
    assert isinstance(node, fx.Node)
    low, high = range_of(node)
    width = x.amax((0, 2, 3)) - x.amin((0, 2, 3))
    assert torch.isfinite(low).all() and (low <= x.amin((0, 2, 3)) - 0.5 * width + 1e-9).all()
    assert (high >= x.amax((0, 2, 3)) + 0.5 * width - 1e-9).all()


class Uneven(nn.Module):
    """relu(a(x)) beside b(x): the first half of the channels is never negative, the other half may be anything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 3), conv_bn(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(self.a(x)), self.b(x)], 1)


RESAMPLERS = [
    nn.ChannelShuffle(2), nn.ChannelShuffle(3), nn.Upsample(scale_factor=2, mode="bicubic"), nn.Upsample(scale_factor=2),
    nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample((13, 11), mode="bilinear", align_corners=True),
    nn.UpsamplingBilinear2d(scale_factor=3), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3),
]  # fmt: skip


@pytest.mark.parametrize("layer", RESAMPLERS, ids=str)
def test_layers_without_weights_keep_values_inside(layer: nn.Module) -> None:
    model, x = prepared(Uneven(), layer), 10 * images(count=8)
    network = normalise(reference_copy(model), (x,))
    annotate_ranges(network)
    observe(network, (x,))
    node = next(n for n in network.graph.nodes if n.target == "1")
    (low, high), (least, most) = range_of(node), node.meta["seen"]
    assert (least >= low).all() and (most <= high).all()
    bicubic = getattr(layer, "mode", "") == "bicubic"
    assert int((low == 0).sum()) == (0 if bicubic else 3) and torch.isinf(high).all()


@pytest.mark.parametrize("layer", RESAMPLERS[:3], ids=str)
def test_a_block_behind_such_a_layer_is_removed_exactly(layer: nn.Module) -> None:
    model = prepared(Uneven(), layer, basic())
    removal = remove_residuals(model, images())
    assert removal.removed == ["2"] and worst_error(removal, model) < 1e-12
    assert removal.blocks[0].form == ("free+pair" if isinstance(layer, nn.ChannelShuffle) else "pair")
