"""Ranges are kept for dimension 1, which is not always the channels: images without a batch, maps flattened in part."""

import math

import pytest
import torch
from removal_nets import Residual, conv, images, prepared
from torch import Tensor, nn

from rmprune import remove_residuals
from rmprune.errors import UnsupportedModel
from rmprune.graph.foreign import reference_copy
from rmprune.graph.network import shape_of
from rmprune.graph.normalise import normalise
from rmprune.graph.ranges import annotate_range, annotate_ranges, range_of
from rmprune.graph.run import run


def test_an_image_without_its_batch_is_refused() -> None:
    """It was a RuntimeError of a reshape: the height was taken for the channels."""
    block = Residual(nn.Sequential(conv(6, 6), nn.ReLU(), conv(6, 6)))
    with pytest.raises(UnsupportedModel, match="without a batch"):
        remove_residuals(prepared(conv(3, 6), nn.ReLU(), block), images()[0])


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Flatten(1, 2), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
        nn.Sequential(nn.Flatten(2), nn.ReLU(), nn.Linear(64, 3), nn.ReLU()),
        nn.Sequential(nn.Flatten(0, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), nn.ReLU()),
        nn.Sequential(nn.Flatten(1, -1), nn.ReLU(), nn.Linear(512, 3), nn.ReLU()),
    ],
    ids=["pool", "convolution", "two dimensions as one", "pixels", "images and channels", "all"],
)
def test_bounds_hold_where_dimension_1_is_not_the_channels(model: nn.Module) -> None:
    """Index 3 of dimension 1 may be 0 to 1, all else is 0: no bound may say that what reads it stays 0."""
    x = torch.zeros(8, 8, 8, dtype=torch.float64)
    x = x[None] if isinstance(model[0], nn.Flatten) else x
    network = normalise(reference_copy(model), (x,))
    x[:, 3, 3] = 1.0
    (first, *others) = network.graph.nodes
    first.meta["range"] = torch.zeros(8).double(), (torch.arange(8) == 3).double()
    for node in others:
        annotate_range(network, node)
    for node, value in run(network.graph, (x,), network.value):
        if node.op == "call_module":
            low, high = range_of(node)
            assert len(low) == value.shape[1] == (shape_of(node) or ())[1]
            flat = value.transpose(0, 1).flatten(1)
            assert bool((flat.amin(1) >= low - 1e-9).all() and (flat.amax(1) <= high + 1e-9).all()), node


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Hardtanh(0.0, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        """(2, 8, 8, 8) times (8, 8): the columns of the second factor go along the width."""
        return x * self.first(x.amax((0, 1)))


def test_a_product_of_maps_of_different_ranks_is_not_multiplied_channel_by_channel() -> None:
    x = torch.rand(2, 8, 8, 8, dtype=torch.float64)
    network = normalise(reference_copy(Product()), (x,))
    annotate_ranges(network, (0.0, 1.0))
    product = list(network.graph.nodes)[-2]
    assert range_of(product)[1].max() == math.inf
