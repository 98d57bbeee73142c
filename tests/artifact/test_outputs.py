"""Networks that return dicts, tuples, lists and None are saved, loaded and exported with their names (case 23)."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import rmprune


class Heads(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 3, 1), how

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.a(x))
        one, two = self.b(y), self.c(y)
        return {
            "dict": {"out": one, "aux": two},
            "ordered": OrderedDict(out=one, x=two),
            "tuple": (one, two),
            "list": [one, two, None],
            "nested": {"maps": [one, (two, None)], "none": None},
            "one": {"out": one},
        }[self.how]


NAMES = {
    "dict": ["out", "aux"],
    "ordered": ["out", "x"],
    "tuple": ["output_0", "output_1"],
    "list": ["output_0", "output_1"],
    "nested": ["maps_0", "maps_1_0"],
    "one": ["out"],
}


@pytest.mark.parametrize("how", NAMES)
def test_outputs_keep_their_names(how: str, tmp_path: Path) -> None:
    net, x = Heads(how).eval(), torch.randn(2, 3, 8, 8)
    pruned = rmprune.prune(net, x, importance="magnitude", budget=rmprune.Budget(macs_ratio=0.5))
    loaded = rmprune.load(rmprune.save(pruned, tmp_path / "net", example_inputs=x))
    expected, found = pruned(x), loaded(x)
    flat, other = (torch.utils._pytree.tree_leaves(value) for value in (expected, found))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(flat, other, strict=True))
    assert not isinstance(expected, dict) or list(found) == list(expected)
    session = onnxruntime.InferenceSession(tmp_path / "net" / "model.onnx")
    assert [value.name for value in session.get_outputs()] == NAMES[how]
    tensors = [value for value in flat if value is not None]
    for value, actual in zip(tensors, session.run(None, {"input": x.numpy()}), strict=True):
        assert torch.allclose(value, torch.from_numpy(actual), atol=1e-5)


def test_several_inputs_keep_their_names(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, image: Tensor, depth: Tensor) -> dict[str, Tensor]:
            return {"out": self.conv(image), "depth": depth + 1}

    inputs = {"depth": torch.randn(2, 1, 4, 4), "image": torch.randn(2, 3, 4, 4)}
    rmprune.save(Two().eval(), tmp_path / "net", example_inputs=inputs)
    graph = onnx.load(tmp_path / "net" / "model.onnx").graph
    assert [value.name for value in graph.input] == ["image", "depth"]
    assert [value.name for value in graph.output] == ["out", "depth_out"]
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)} == {"batch"}
