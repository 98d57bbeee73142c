"""Pruned networks of layers of every rank are saved, loaded, exported to ONNX and measured."""

from collections.abc import Callable

import pytest
import torch
from marks import few
from torch import Tensor, nn

import rmprune


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.down(nn.functional.gelu(self.up(y)))


class Values(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.einsum("bnd,bmd->bnm", self.q(x), self.k(x)).softmax(-1)
        return self.o(torch.bmm(weights, self.v(x)))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "1-D": lambda: (
        nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 16, 3, groups=8), nn.MaxPool1d(2),
                      nn.InstanceNorm1d(16, affine=True), nn.ConvTranspose1d(16, 6, 2, 2), nn.Conv1d(6, 2, 1)),
        torch.randn(2, 3, 16),
    ),
    "2-D": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.ConvTranspose2d(8, 12, 3, 2, groups=2),
                      nn.InstanceNorm2d(12), nn.Conv2d(12, 2, 1)),
        torch.randn(2, 3, 8, 8),
    ),
    "3-D": lambda: (
        nn.Sequential(nn.Conv3d(3, 8, 3, bias=False), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
                      nn.ConvTranspose3d(8, 8, 2, groups=8), nn.Conv3d(8, 4, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                      nn.Linear(4, 2)),
        torch.randn(2, 3, 6, 6, 6),
    ),
    "attention": lambda: (Attention(), torch.randn(2, 6, 8)),
    "products": lambda: (Values(), torch.randn(2, 6, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", few(NETWORKS, "2-D", "attention"))
def test_a_pruned_network_comes_back(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    model.eval()
    budget = rmprune.Budget(macs_ratio=0.8, reference_macs=rmprune.count_macs(model, x))
    pruned = rmprune.prune(model, x, importance="magnitude", budget=budget)
    assert rmprune.count_macs(pruned, x) <= 0.8 * rmprune.count_macs(model, x)
    rmprune.save(pruned, tmp_path / "net", example_inputs=x)  # ONNX too, which is compared
    assert torch.equal(rmprune.load(tmp_path / "net")(x), pruned(x))
    assert rmprune.measure_latency(pruned, x[:1], backend="eager", seconds=0.01, min_rounds=1).median_ms > 0
