"""Where time and resident memory go."""

import sys

import pytest
import torch
from torch import Tensor, nn

from rmprune.errors import ConfigError
from rmprune.measure import activation_memory
from rmprune.measure.memory import peak_resident_mib
from rmprune.measure.profile import profile_layers


class Net(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 8, 1), nn.Conv2d(8, wide, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.large(torch.relu(self.small(x))))


def test_the_dear_layer_of_each_network_is_found() -> None:
    x = torch.randn(1, 3, 32, 32)
    table = profile_layers({"before": Net(64), "after": Net(8)}, x, threads=1, batch_size=2, runs=5)
    assert list(table.columns) == ["network", "position", "layer", "operator", "ms", "share"]
    assert table.groupby("network").share.sum().tolist() == pytest.approx([1.0, 1.0])
    before = table[table.network == "before"]
    assert before.position.tolist() == list(range(len(before)))
    dearest = before.loc[before.ms.idxmax()]
    assert "large" in dearest.layer and "Conv" in dearest.operator and dearest.share > 0.5
    with pytest.raises(ConfigError, match="at least 1"):
        profile_layers({"net": Net(8)}, x, runs=0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count is Linux's")
def test_resident_memory_holds_the_activations() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)), torch.randn(1, 3, 64, 64)
    planned = activation_memory(net, x.expand(64, -1, -1, -1)).peak_bytes / 2**20
    assert planned == 32.0  # twice 16 channels of 64 images of 64 x 64
    assert 0.9 * planned < peak_resident_mib(net, x, backend="eager", batch_size=64) < 3 * planned
