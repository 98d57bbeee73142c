"""Ranges are kept for dimension 1, which is not always the channels: images without a batch, maps flattened in part."""

import math

import pytest
import torch
from removal_nets import Residual, conv, images, prepared
from torch import Tensor, nn

from rmprune import Budget, prune, remove_residuals
from rmprune.errors import UnsupportedModel
from rmprune.graph.foreign import reference_copy
from rmprune.graph.network import shape_of
from rmprune.graph.normalise import normalise
from rmprune.graph.ranges import annotate_range, annotate_ranges, range_of
from rmprune.graph.run import run
from rmprune.pruning.find_groups import find_structure


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


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("statistics", [True, False])
def test_batch_norms_of_several_processes_take_maps_of_any_dimensions(dimensions: int, statistics: bool) -> None:
    """As convert_sync_batchnorm makes them of the stock ones, of heads too."""
    torch.manual_seed(0)
    kind, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dimensions - 1]
    head = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()]
    own = nn.Sequential(
        kind(3, 8, 3), norm(8, track_running_stats=statistics), nn.ReLU(), kind(8, 8, 3), norm(8), nn.ReLU(), nn.Flatten(2), Mean(),
        *(head if statistics else head[:1]), nn.Linear(8, 4),
    )  # fmt: skip
    model = nn.SyncBatchNorm.convert_sync_batchnorm(own).double().eval()
    x = torch.randn(2, 3, *[8] * dimensions).double()
    found = prune(model, x, budget=Budget(ratio=0.4), importance="magnitude")
    assert found(x).shape == (2, 4) and find_structure(model, x).units == find_structure(own.double(), x).units


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


class Called(nn.Module):
    """Calls that mean another thing for another number of dimensions than that of maps."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv = (nn.Conv3d if what == "frames" else nn.Conv2d)(3, 8, 3)
        self.norm, self.fc, self.one = nn.BatchNorm1d(8), nn.Linear(8, 4), nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        if self.what == "frames":
            return self.fc(x.mean([-2, -1]).mean(-1))
        x = x.flatten(2)
        x = x.mean(-1)
        if self.what == "features":
            norm = self.norm
            return self.fc(nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))
        return (self.fc(x) * self.one).squeeze(0)


@pytest.mark.parametrize("what", ["frames", "features", "scores"])
def test_calls_on_other_than_maps(what: str) -> None:
    torch.manual_seed(0)
    model = Called(what).double().eval()
    x = torch.randn(2, 3, *[8] * (3 if what == "frames" else 2)).double()
    expected = model(x)
    if what != "features":  # whose channels the call holds
        found = prune(model, x, budget=Budget(ratio=0.3), importance="magnitude")
        assert found(x).shape == expected.shape and find_structure(found, x).units["conv"] < 8
    network = normalise(reference_copy(model), (x,))
    *_, (_, value) = run(network.graph, (x,), network.value)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
