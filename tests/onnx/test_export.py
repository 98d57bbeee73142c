"""ONNX files: equal to the network within what float32 does to it, or not written."""

from pathlib import Path

import pytest
import torch
from artifact_nets import net
from torch import nn

from rmprune.artifact.files import save
from rmprune.errors import NotEquivalent
from rmprune.onnx import export
from rmprune.onnx.compare import rounding
from rmprune.onnx.export import export_onnx


def test_onnx_equals_pytorch_for_any_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import onnx
    import onnxruntime

    model = net().eval()
    error = export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    assert error < 1e-5
    assert capfd.readouterr() == ("", "")
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(tmp_path / "m.onnx").graph.node)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 8, 8)
    assert torch.allclose(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model(x), atol=1e-4)
    target = save(model, tmp_path / "a", example_inputs=x)
    assert (target / "model.onnx").exists()


def test_an_export_that_differs_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotEquivalent, match="limit"):
        export_onnx(net(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_not_finite_are_no_equality(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
    model[0].weight.data.fill_(float("inf"))
    with pytest.raises(NotEquivalent, match="not finite"):
        export_onnx(model, torch.randn(2, 3, 2, 2), tmp_path / "m.onnx")


@pytest.mark.parametrize("scale", [1.0, 1e9], ids=["of the given inputs", "of the normal ones alone"])
def test_onnx_may_differ_by_what_float32_does_to_the_network_and_no_more(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that takes a small difference of large numbers: its own float32 rounding is beyond the fixed limit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1, bias=False)).eval()
    x = torch.randn(2, 2, 9, 9) * torch.tensor([scale, 1.0]).reshape(1, 2, 1, 1)
    with torch.no_grad():
        model[0].bias.fill_(1e5)
        model[0].weight.copy_(torch.eye(2).reshape(2, 2, 1, 1))
        model[1].weight.copy_(torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1))
    given, normal = (rounding(model, batch) for batch in export._batches((x,)))
    assert normal > 1e-4 and (given > 1e-4) == (scale == 1)
    monkeypatch.setattr(export, "_onnx_errors", lambda *_: [3 * given, 3 * normal])
    export_onnx(model, x, tmp_path / "model.onnx")
    monkeypatch.setattr(export, "_onnx_errors", lambda *_: [3 * given, 5 * normal])
    with pytest.raises(NotEquivalent, match="differs"):
        export_onnx(model, x, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()
