"""ONNX files: equal to the network within what float32 does to it, or not written."""

import gc
from pathlib import Path

import onnx
import pytest
import torch
from artifact_nets import net
from torch import nn

import rmprune
from rmprune.artifact.files import save
from rmprune.errors import NotEquivalent
from rmprune.onnx import bare, export
from rmprune.onnx.compare import open_session, rounding
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


def test_weights_over_the_limit_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    export_onnx(model, x, tmp_path / "one.onnx")
    monkeypatch.setattr(bare, "EXTERNAL_OVER", 1000)
    assert export_onnx(model, x, tmp_path / "net.onnx") < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data", "one.onnx"]
    assert (tmp_path / "net.onnx").stat().st_size < 1500 < (tmp_path / "net.onnx.data").stat().st_size
    one, two = (onnx.load(tmp_path / name, load_external_data=False).graph for name in ("one.onnx", "net.onnx"))
    assert [value.name for value in two.input] == ["input"] and list(two.output) == list(one.output)
    assert open_session(tmp_path / "net.onnx").run(None, {"input": x[:1].numpy()})[0].shape == (1, 4)
    with pytest.raises(NotEquivalent):
        export_onnx(model, x, tmp_path / "none.onnx", tolerance=0)
    assert len(list(tmp_path.iterdir())) == 3


def test_networks_are_not_held_in_circles(tmp_path: Path) -> None:
    """What was copied, traced, folded and written is gone when a call is over, not when Python looks for circles."""
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (graph.call_module("block", (x,)), x)))
    model, image = torch.fx.GraphModule({"block": block}, graph).eval(), torch.randn(2, 4, 4, 4)

    def run() -> None:
        assert rmprune.plan_removal(model, image)[0].removable
        rmprune.save(model, tmp_path / "net", example_inputs=image, overwrite=True)

    run()
    gc.collect()
    gc.disable()
    try:
        before = {id(o) for o in gc.get_objects() if type(o) is nn.Conv2d}
        run()
        held = [o for o in gc.get_objects() if type(o) is nn.Conv2d and id(o) not in before]
        assert all(layer.weight.is_meta for layer in held)
    finally:
        gc.enable()
