"""Shapes by formula and on the meta device are those that a run gives, for layers of every rank."""

from typing import Any

import pytest
import torch
from torch import nn

from rmprune.graph.normalise import normalise
from rmprune.graph.shapes import Plainly, to_run


class Twice(nn.Linear):
    __module__ = nn.__name__  # what is of torch is not looked into

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).repeat_interleave(2, -1)


class Padded(nn.Conv2d):
    __module__ = nn.__name__

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


LAYERS = {
    "1-D, strided": (nn.Conv1d(4, 6, 3, 2), (4, 9)),
    "3-D, dilated": (nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 2, 1), dilation=(1, 2, 1)), (4, 3, 7, 5)),
    "padding in words": (nn.Conv2d(4, 6, 3, padding="same"), (4, 7, 5)),
    "circular": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), (4, 7, 5)),
    "padded by itself": (Padded(4, 6, 3), (4, 7, 5)),
    "unbatched": (nn.Conv1d(2, 6, 2), (2,)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, output_padding=1), (4, 7, 5)),
    "norm of tokens": (nn.BatchNorm1d(4), (4, 9)),
    "norm of rows": (nn.BatchNorm1d(4), (4,)),
    "tokens": (nn.Linear(4, 6), (9, 4)),
    "tokens, twice as wide": (Twice(4, 6), (9, 4)),
    "activation of tokens": (nn.GELU(), (9, 4)),
    "slopes": (nn.PReLU(4), (4, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_are_those_of_a_run(name: str) -> None:
    layer, size = LAYERS[name]
    model, x = nn.Sequential(layer).double().eval(), torch.randn(2, *size, dtype=torch.float64)
    *_, node, _ = normalise(model, (x,)).graph.nodes
    assert node.meta["shape"] == tuple(model(x).shape)


@pytest.mark.parametrize("layer", [nn.GRU(4, 3), nn.MultiheadAttention(4, 2)])
def test_a_layer_runs_without_values_and_is_left_alone(layer: nn.Module) -> None:
    x = torch.empty(5, 2, 4, dtype=torch.float64, device="meta")
    y = to_run(layer.eval(), torch.float64)(*[x] * (3 if isinstance(layer, nn.MultiheadAttention) else 1))[0]
    assert y.is_meta and y.dtype == torch.float64
    assert not any(p.is_meta or p.dtype != torch.float32 for p in layer.parameters())


@pytest.mark.parametrize(
    ("channels", "settings"),
    [
        (4, {"kernel_size": 3, "stride": 2, "padding": 1}),
        (4, {"kernel_size": (1, 3), "dilation": (1, 2), "groups": 2, "bias": False}),
        (4, {"kernel_size": 9}),  # larger than the map
        (3, {"kernel_size": 3}),  # of other channels
        (4, {"kernel_size": 3, "padding": "same"}),
    ],
)
def test_a_convolution_by_formula_is_that_of_torch(channels: int, settings: dict[str, Any]) -> None:
    def outcome(device: str) -> Any:
        layer = nn.Conv2d(4, 6, **settings, device=device)
        try:
            return layer(torch.empty(2, channels, 7, 5, device=device)).shape
        except RuntimeError:
            return None

    with Plainly():
        assert outcome("meta") == outcome("cpu")
