"""Where time and resident memory go."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rmprune.errors import ConfigError
from rmprune.measure import activation_memory, count_macs
from rmprune.measure.candidate import Candidate, FileCandidate
from rmprune.measure.memory import peak_resident_mib
from rmprune.measure.profile import profile_candidates, profile_layers
from rmprune.measure.quantise import onnx_int8
from rmprune.onnx.file import open_onnx


class Net(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 8, 1), nn.Conv2d(8, wide, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.large(torch.relu(self.small(x))))


def test_the_dear_layer_of_each_network_is_found() -> None:
    x = torch.randn(1, 3, 32, 32)
    table = profile_layers({"before": Net(64), "after": Net(8)}, x, threads=1, batch_size=2, runs=5)
    columns = "network position layer operator cin cout macs ms share"
    assert list(table.columns) == columns.split()
    assert table.groupby("network").share.sum().tolist() == pytest.approx([1.0, 1.0])
    before = table[table.network == "before"]
    assert before.position.tolist() == list(range(len(before)))
    dearest = before.loc[before.ms.idxmax()]
    assert "large" in dearest.layer and "Conv" in dearest.operator and dearest.share > 0.5
    assert (dearest.cin, dearest.cout, dearest.macs) == (8, 64, 8 * 64 * 25 * 32 * 32)
    with pytest.raises(ConfigError, match="at least 1"):
        profile_layers({"net": Net(8)}, x, runs=0)


class Kinds(nn.Module):
    """A layer of each kind that multiplies, several of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.up = nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.tokens, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.up(self.grouped(x)).flatten(2).transpose(1, 2))
        return self.head((torch.softmax(x @ x.transpose(1, 2), -1) @ x).mean(1))


def test_macs_are_those_that_are_counted() -> None:
    net, x = Kinds(), torch.randn(1, 4, 8, 8)
    table = profile_layers({"net": net}, x, threads=1, batch_size=3, runs=1)
    assert table.macs.sum() == count_macs(net, x)
    widths = {row.layer: (row.cin, row.cout) for row in table.itertuples() if row.cout == row.cout}
    assert [widths[name] for name in ("grouped", "up", "tokens", "head")] == [(4, 8), (8, 6), (6, 5), (5, 3)]


def test_a_layer_in_int8_is_the_layer(tmp_path: Path) -> None:
    net, x = Net(16).eval(), torch.randn(4, 3, 6, 10)
    (tmp_path / "int8.onnx").write_bytes(onnx_int8(Candidate("net", net, x, x)))
    candidate = FileCandidate("int8", open_onnx(tmp_path / "int8.onnx"), (x[:1],))
    rows = {row["layer"]: row for row in profile_candidates({"int8": candidate}, 1, 2, runs=1)["int8"]}
    assert (rows["large"]["operator"], rows["large"]["cin"], rows["large"]["cout"]) == ("QLinearConv", 8, 16)
    assert sum(row["macs"] or 0 for row in rows.values()) == count_macs(net, x)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count is Linux's")
def test_resident_memory_holds_the_activations() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)), torch.randn(1, 3, 64, 64)
    planned = activation_memory(net, x.expand(64, -1, -1, -1)).peak_bytes / 2**20
    assert planned == 32.0  # twice 16 channels of 64 images of 64 x 64
    assert 0.9 * planned < peak_resident_mib(net, x, backend="eager", batch_size=64) < 3 * planned
