"""From file to file: the same outputs in ONNX Runtime, and what a file says of itself besides."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_examples import graph_of, normal, residual, written
from onnxruntime.transformers.float16 import convert_float_to_float16

from rmprune import artifact
from rmprune.config import ConvertConfig, NetworkConfig
from rmprune.errors import RmpruneError
from rmprune.onnx import bare
from rmprune.onnx.file import open_onnx
from rmprune.pipelines.convert import run_convert


def converted(model: onnx.ModelProto, folder: Path, **settings: Any) -> Path:
    source = written(model, folder / "camera.onnx")
    return run_convert(ConvertConfig(NetworkConfig(str(source)), folder / "out", **settings))


def outputs(path: Path, *sizes: int) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    found: np.ndarray[Any, Any] = session.run(None, {entry.name: normal(*sizes, seed=9)})[0]
    return found


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("opset", [7, 11, 13, 17, 22])
def test_a_file_becomes_a_file_without_additions(
    opset: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = converted(residual(opset=opset), tmp_path, check=True)
    before, after = onnx.load(tmp_path / "camera.onnx"), onnx.load(out / "model.onnx")
    assert "Add" not in operators(out / "model.onnx")
    assert [(x.domain, x.version) for x in after.opset_import] == [("", opset)]
    for name in ("input", "output", "name"):
        assert getattr(after.graph, name) == getattr(before.graph, name)
    for name in ("metadata_props", "doc_string", "ir_version"):
        assert getattr(after, name) == getattr(before, name)
    for batch in (1, 5):
        expected = outputs(tmp_path / "camera.onnx", batch, 3, 8, 8)
        assert np.allclose(outputs(out / "model.onnx", batch, 3, 8, 8), expected, atol=1e-5 * abs(expected).max())
    assert sorted(file.name for file in out.iterdir()) == ["architecture.json", "model.onnx", "model.safetensors"]
    assert artifact.read_extra(out)["removal"]["removed"] == ["block"]
    assert "in ONNX Runtime" in capsys.readouterr().out


def in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """With weights that float32 does not hold."""
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).astype(np.float64) * (1 + 1e-9)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return model


def outputs_in(path: Path, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What ONNX's own reference computes, which has convolutions in every format."""
    found: np.ndarray[Any, Any] = ReferenceEvaluator(open_onnx(path).proto).run(None, {"image:0": image})[0]
    return found


@pytest.mark.parametrize(
    ("convert", "given", "inside", "limit"),
    [
        (in_double, np.float64, 11, 1e-13),
        (convert_float_to_float16, np.float16, 10, 3e-3),
        (partial(convert_float_to_float16, keep_io_types=True), np.float32, 10, 3e-3),
    ],
    ids=["double", "float16", "float16 between casts"],
)
def test_a_file_in_another_format_stays_in_it(
    convert: Any, given: Any, inside: int, limit: float, tmp_path: Path
) -> None:
    out = converted(convert(residual()), tmp_path, check=True)
    before, after = onnx.load(tmp_path / "camera.onnx"), onnx.load(out / "model.onnx")
    assert "Add" not in operators(out / "model.onnx")
    assert after.graph.input == before.graph.input and after.graph.output == before.graph.output
    assert {tensor.data_type for tensor in after.graph.initializer} == {inside}
    image = normal(3, 3, 8, 8).astype(given)
    expected, found = (outputs_in(path, image) for path in (tmp_path / "camera.onnx", out / "model.onnx"))
    assert found.dtype == expected.dtype == given
    assert abs(found.astype(float) - expected).max() <= limit * abs(expected).max()
    again = artifact.load(out)
    assert {str(weight.dtype) for weight in again.parameters()} == {
        "torch.float64" if inside == 11 else "torch.float16"
    }


def test_weights_beyond_float16_are_refused_and_nothing_written(tmp_path: Path) -> None:
    """A batch norm of a small map: folded into its convolution it makes weights that the format does not hold."""
    model = residual()
    values = {"scale": np.full(4, 1e3), "zero": np.zeros(4), "a": normal(4, 3, 3, 3) / 1e3, "b": normal(4, 4, 3, 3)}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in values]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(np.float32(value), name) for name, value in values.items())
    model.graph.node[2].output[0] = "small"
    norm = onnx.helper.make_node("BatchNormalization", ["small", "scale", "zero", "zero", "zero"], ["3"])
    model.graph.node.insert(3, norm)
    with pytest.raises(RmpruneError, match=r"float16.* off by inf|leave the range of float16"):
        converted(convert_float_to_float16(model), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["camera.onnx"]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_stays(batch: int, tmp_path: Path) -> None:
    out = converted(residual(batch=batch), tmp_path, check=True)
    assert onnx.load(out / "model.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
    assert outputs(out / "model.onnx", batch, 3, 8, 8).shape == (batch, 5)


def test_open_sizes_of_images_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(residual(pixels=("height", "width")), tmp_path / "camera.onnx")
    opened: list[Any] = []
    real = onnxruntime.InferenceSession
    with monkeypatch.context() as patch:
        patch.setattr(
            onnxruntime, "InferenceSession", lambda *given, **kw: opened.append(given[0]) or real(*given, **kw)
        )
        out = run_convert(ConvertConfig(NetworkConfig(str(source), image_size=16), tmp_path / "out"))
    assert len(opened) == 2 and opened[0] == str(source)  # the file and the new one, once each
    assert onnx.load(out / "model.onnx").graph.input == onnx.load(source).graph.input
    assert np.allclose(outputs(out / "model.onnx", 2, 3, 9, 7), outputs(source, 2, 3, 9, 7), atol=1e-4)


def test_two_inputs_and_two_outputs_keep_their_names_and_sizes(tmp_path: Path) -> None:
    """A second image, of other channels and open sizes of its own, is added to the first behind a convolution; its map is given, too."""
    model = residual(pixels=("height", "width"))
    make, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    same = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    model.graph.input.append(tensor("depth", onnx.TensorProto.FLOAT, ["batch", 1, "height", "width"]))
    model.graph.output.append(tensor("map", onnx.TensorProto.FLOAT, None))
    model.graph.initializer.append(onnx.numpy_helper.from_array(normal(4, 1, 3, 3, seed=4), "f"))
    model.graph.node[0].output[0] = "0"
    model.graph.node.insert(1, make("Conv", ["depth", "f"], ["map"], **same))
    model.graph.node.insert(2, make("Add", ["0", "map"], ["1"]))
    source = written(model, tmp_path / "camera.onnx")
    config = NetworkConfig(str(source), image_size=16)
    out = run_convert(ConvertConfig(config, tmp_path / "out", check=True))
    assert onnx.load(out / "model.onnx").graph.input == model.graph.input
    given = {"image:0": normal(3, 3, 9, 7), "depth": normal(3, 1, 9, 7, seed=5)}
    for a, b in zip(
        *(onnxruntime.InferenceSession(p).run(["scores/out:0", "map"], given) for p in (source, out / "model.onnx")),
        strict=True,
    ):
        assert np.allclose(a, b, atol=1e-5 * abs(a).max())
    assert artifact.read_extra(out)["removal"]["removed"] == ["block"]


def test_sizes_that_decide_are_fixed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A network that adds its own width: with constants of one size the new file would be another function on the next."""
    model = residual(pixels=("height", "width"))
    scores = model.graph.node[-1]
    scores.output[0] = "10"
    make = onnx.helper.make_node
    model.graph.node.extend(
        [make("Shape", ["image:0"], ["11"], start=3), make("Cast", ["11"], ["12"], to=1), make("Add", ["10", "12"], ["scores/out:0"])]
    )  # fmt: skip
    source = written(model, tmp_path / "camera.onnx")
    out = run_convert(ConvertConfig(NetworkConfig(str(source), image_size=16), tmp_path / "out"))
    dims = onnx.load(out / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [0, 3, 16, 16] and "depends on the size" in caplog.text
    assert np.allclose(outputs(out / "model.onnx", 2, 3, 16, 16), outputs(source, 2, 3, 16, 16), atol=1e-4)


def strided(kind: str) -> onnx.ModelProto:
    """Open sizes, and a layer whose border depends on them: it is the same for sizes that differ by a multiple of its stride."""
    model = residual(pixels=("height", "width"))
    make = onnx.helper.make_node
    same = {"auto_pad": "SAME_UPPER", "strides": [2, 2], "kernel_shape": [3, 3]}
    layer = {
        "convolution": make("Conv", ["2", "b"], ["2b"], **same),
        "average": make("AveragePool", ["2"], ["2b"], count_include_pad=1, **same),
        "ceiling": make(
            "AveragePool", ["2"], ["2b"], ceil_mode=1, strides=[2, 2], kernel_shape=[2, 2], count_include_pad=0
        ),
        "even": make("AveragePool", ["2"], ["2b"], strides=[2, 2], kernel_shape=[2, 2]),
    }[kind]
    for node in model.graph.node[2:]:
        node.input[:] = ["2b" if name == "2" else name for name in node.input]
    model.graph.node.insert(2, layer)
    return model


@pytest.mark.parametrize("kind", ["convolution", "average", "ceiling", "even"])
def test_open_sizes_stay_open_only_where_the_new_file_is_right_for_all(kind: str, tmp_path: Path) -> None:
    source = written(strided(kind), tmp_path / "camera.onnx")
    out = run_convert(ConvertConfig(NetworkConfig(str(source), image_size=16), tmp_path / "out"))
    dims = onnx.load(out / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    is_open = [bool(dim.dim_param) for dim in dims[2:]]
    assert is_open == [True, True] if kind == "even" else is_open in ([True, True], [False, False])
    for height, width in ((16, 16), (17, 16), (19, 21), (33, 18)):
        if all(is_open) or (height, width) == (16, 16):
            expected = outputs(source, 2, 3, height, width)
            found = outputs(out / "model.onnx", 2, 3, height, width)
            assert np.allclose(found, expected, atol=1e-5 * abs(expected).max())


def uneven(sizes: list[Any]) -> onnx.ModelProto:
    """Images [N, H, W, C], and a layer whose border depends on H alone."""
    model, make = residual(pixels=("height", "width")), onnx.helper.make_node
    model.graph.node[0].input[0], model.graph.node[2].input[0] = "0", "2b"
    model.graph.node[5].input[1] = "2b"
    model.graph.node.insert(0, make("Transpose", ["image:0"], ["0"], perm=[0, 3, 1, 2]))
    strides = {"auto_pad": "SAME_UPPER", "strides": [2, 1], "kernel_shape": [3, 3]}
    model.graph.node.insert(3, make("Conv", ["2", "b"], ["2b"], **strides))
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("image:0", onnx.TensorProto.FLOAT, sizes))
    return model


def padded_to(least: int) -> onnx.ModelProto:
    """Open sizes; a map is filled up with zeros to `least` pixels a side, and larger ones stay."""
    model, make = residual(pixels=("height", "width")), onnx.helper.make_node
    known = {"from": [2], "to": [4], "least": [least, least], "none": [0] * 6}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), name) for name, v in known.items())
    for at, node in enumerate(
        [
            make("Shape", ["2"], ["s0"]),
            make("Slice", ["s0", "from", "to"], ["s1"]),
            make("Max", ["s1", "least"], ["s2"]),
            make("Sub", ["s2", "s1"], ["s3"]),
            make("Concat", ["none", "s3"], ["s4"], axis=0),
            make("Pad", ["2", "s4"], ["2b"]),
        ]
    ):
        model.graph.node.insert(2 + at, node)
    for node in model.graph.node[8:]:
        node.input[:] = ["2b" if name == "2" else name for name in node.input]
    return model


@pytest.mark.parametrize(
    ("model", "size", "others"),
    [
        (uneven(["n", "height", "width", 3]), 16, [(2, 17, 16, 3), (2, 32, 32, 3)]),
        (uneven(["n", "height", 16, 3]), None, [(2, 17, 16, 3)]),
        (padded_to(20), 24, [(2, 3, 12, 12)]),
    ],
    ids=["channels last", "height alone", "smaller"],
)
def test_every_open_axis_is_tried_by_itself_and_smaller(
    model: onnx.ModelProto, size: int | None, others: list[Any], tmp_path: Path
) -> None:
    source = written(model, tmp_path / "camera.onnx")
    out = run_convert(ConvertConfig(NetworkConfig(str(source), image_size=size), tmp_path / "out"))
    dims = onnx.load(out / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    for sizes in others:
        if all(dim.dim_param or dim.dim_value == n for dim, n in zip(dims, sizes, strict=True)):
            expected, found = outputs(source, *sizes), outputs(out / "model.onnx", *sizes)
            assert np.allclose(found, expected, atol=1e-5 * abs(expected).max())
        else:
            assert [dim.dim_param for dim in dims] == ["n" if sizes[-1] == 3 else "batch", "", "", ""]


def test_open_channels_that_the_weights_fix_stay_as_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = residual()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "channels"
    out = converted(model, tmp_path)
    assert onnx.load(out / "model.onnx").graph.input == model.graph.input and "fixed" not in caplog.text


def test_weights_over_the_limit_lie_beside_the_file_in_both_directions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = tmp_path / "camera.onnx", residual()
    onnx.save_model(model, source, save_as_external_data=True, location="camera.bin", size_threshold=100)
    monkeypatch.setattr(bare, "EXTERNAL_OVER", 1000)
    out = run_convert(ConvertConfig(NetworkConfig(str(source)), tmp_path / "out"))
    assert (out / "model.onnx").stat().st_size < 4000 and (out / "model.onnx.data").stat().st_size > 1000
    expected = outputs(source, 2, 3, 8, 8)
    assert np.allclose(outputs(out / "model.onnx", 2, 3, 8, 8), expected, atol=1e-5 * abs(expected).max())
    again = run_convert(ConvertConfig(NetworkConfig(str(source)), out, overwrite=True))
    assert (again / "model.onnx.data").is_file() and len(list(tmp_path.iterdir())) == 3


def test_names_that_the_exporter_uses_itself_are_free(tmp_path: Path) -> None:
    model = residual()
    model.graph.input[0].name = model.graph.node[0].input[0] = "/relu/Relu_output_0"
    for name in ("i0", "n1.weight"):
        model.graph.output[0].name = model.graph.node[-1].output[0] = name
        out = converted(model, tmp_path, check=True, overwrite=True)
        assert onnx.load(out / "model.onnx").graph.output[0].name == name


def test_a_linear_layer_on_maps_is_written_without_a_transposition(tmp_path: Path) -> None:
    model = residual()
    make = onnx.helper.make_node
    del model.graph.node[-3:]
    model.graph.node.append(make("MatMul", ["7", "g"], ["scores/out:0"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(normal(8, 5), "g"))
    out = converted(model, tmp_path, check=True)
    assert operators(out / "model.onnx")[-1] == "MatMul" and "Transpose" not in operators(out / "model.onnx")


def test_a_file_that_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(graph: Any, weights: dict[str, Any]) -> None:
        for name in weights:
            weights[name] = weights[name] * 1.01

    monkeypatch.setattr(bare, "_fold_weights", damaged)
    with pytest.raises(RmpruneError, match="the new file, differs from the file by"):
        converted(residual(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["camera.onnx"]


def test_the_file_can_be_left_out(tmp_path: Path) -> None:
    out = converted(residual(), tmp_path, onnx=False, check=True)
    assert sorted(file.name for file in out.iterdir()) == ["architecture.json", "model.safetensors"]


def test_a_network_without_residuals_is_refused_and_nothing_written(tmp_path: Path) -> None:
    model = graph_of([onnx.helper.make_node("Conv", ["x", "w"], ["y"])], {"w": normal(2, 3, 3, 3)}, ["n", 3, 8, 8])
    with pytest.raises(RmpruneError, match="no residual to remove"):
        converted(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["camera.onnx"]


def test_what_is_converted_is_not_overwritten(tmp_path: Path) -> None:
    out = converted(residual(), tmp_path)
    config = ConvertConfig(NetworkConfig(str(out / "model.onnx")), out, overwrite=True)
    with pytest.raises(RmpruneError, match="holds it"):
        run_convert(config)
