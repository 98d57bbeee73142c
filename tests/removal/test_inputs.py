"""Several inputs through every call: a tuple, or a dict by the names in forward (case 12)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rmprune
from rmprune.errors import UnsupportedModel
from rmprune.graph.inputs import Inputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.d, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        y = torch.relu(self.a(image) + self.b(depth))
        return self.out(torch.relu(y + self.d(torch.relu(self.c(y)))))  # type: ignore[no-any-return]


IMAGE, DEPTH = torch.randn(4, 3, 8, 8), torch.randn(4, 1, 8, 8)
FORMS: list[Inputs] = [(IMAGE, DEPTH), {"image": IMAGE, "depth": DEPTH}, {"depth": DEPTH, "image": IMAGE}]


@pytest.mark.parametrize("inputs", FORMS)
def test_several_inputs(inputs: Inputs, tmp_path: Path) -> None:
    net = Two().eval()
    expected = net(IMAGE, DEPTH)
    removal = rmprune.remove_residuals(net, inputs)
    assert removal.removed == ["add#2"] and torch.allclose(removal.model(IMAGE, DEPTH), expected, atol=1e-4)
    assert [block.removable for block in rmprune.plan_removal(net, inputs)] == [
        block.removable for block in removal.blocks
    ]
    assert rmprune.count_macs(net, inputs) == 64 * 9 * (3 * 8 + 8 + 64 + 64) + 64 * 16
    for backend in ("eager", "onnxruntime"):
        time = rmprune.measure_latency(removal.model, inputs, backend=backend, seconds=0.0, min_rounds=1)
        assert time.batch_size == 4 and time.median_ms > 0
    with pytest.raises(UnsupportedModel, match="one input only"):
        rmprune.measure_latency(removal.model, inputs, backend="torchscript", seconds=0.0, min_rounds=1)
    assert list(rmprune.collapse_blocks(net, inputs).collapsed) == ["add#2"]
    pruned = rmprune.prune(removal.model, inputs, importance="magnitude", budget=rmprune.Budget(macs_ratio=0.5))
    assert rmprune.count_macs(pruned, inputs) <= 0.5 * rmprune.count_macs(removal.model, inputs)
    loaded = rmprune.load(rmprune.save(pruned, tmp_path / "two", example_inputs=inputs))
    assert torch.equal(loaded(IMAGE, DEPTH), pruned(IMAGE, DEPTH))


def test_a_missing_input_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="depth is missing"):
        rmprune.remove_residuals(Two().eval(), {"image": IMAGE})
    for call in (rmprune.remove_residuals, rmprune.count_macs):
        with pytest.raises(UnsupportedModel, match=r"missing 1 required positional argument: 'depth'"):
            call(Two().eval(), IMAGE)
