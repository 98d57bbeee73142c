"""`measure FILE.onnx ...`: the files themselves, in turns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_examples import graph_of, normal, residual, written

from rmprune.cli import main
from rmprune.config import MeasureConfig, RemeasureConfig
from rmprune.errors import ConfigError, RmpruneError
from rmprune.onnx.file import open_onnx
from rmprune.onnx.read import read_network
from rmprune.pipelines.measure_files import _example_shapes, run_measure_files

QUICK = MeasureConfig(threads=(1,), seconds=0.0, min_rounds=3)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, ...]:
    return written(residual(), tmp_path / "a.onnx"), written(residual(pixels=("h", "w")), tmp_path / "b.onnx")


def test_files_are_measured_side_by_side(files: tuple[Path, ...], capsys: pytest.CaptureFixture[str]) -> None:
    found = run_measure_files(RemeasureConfig(files, measure=replace(QUICK, batch_sizes=(1, 2)), profile=True))
    assert [list(found), [time.batch_size for time in found[str(files[1])]]] == [[str(file) for file in files], [1, 2]]
    assert all(time.backend == "onnxruntime" and time.median_ms > 0 for times in found.values() for time in times)
    assert [time.ratio for time in found[str(files[0])]] == [1.0, 1.0]
    assert found[str(files[1])][0].reference == str(files[0])
    said = capsys.readouterr().out
    assert "onnxruntime, 1 thread, batch 2" in said and said.count("1.00x") >= 2
    assert " ".join(said.split()).count("layer by layer: onnxruntime, 1 thread, batch 1") == 2


def test_what_no_importer_reads_is_measured_as_it_stands(tmp_path: Path) -> None:
    """Quantised, an operator that is not on the list, and a number of images that the file says."""
    make = onnx.helper.make_node
    scale = {"s": normal(1) ** 2, "z": normal(1).astype("uint8")}
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["q"]),
        make("DequantizeLinear", ["q", "s", "z"], ["d"]),
        make("Sin", ["d"], ["y"]),
    ]
    path = written(graph_of(nodes, scale, [3, 2, 4, 4]), tmp_path / "a.onnx")
    (time,) = run_measure_files(RemeasureConfig((path,), measure=QUICK))[str(path)]
    assert time.batch_size == 3
    with pytest.raises(ConfigError, match="takes batches of 3, which --batch-size cannot change"):
        run_measure_files(RemeasureConfig((path,), measure=replace(QUICK, batch_sizes=(2,))))


def test_what_cannot_be_compared_is_refused(files: tuple[Path, ...], tmp_path: Path) -> None:
    other = written(residual(pixels=(9, 9)), tmp_path / "c.onnx")
    for runs, size, words in [
        ((files[0], tmp_path), None, "not both at once"),
        ((files[0], files[0]), None, "named twice"),
        ((files[0], other), None, "measure them apart"),
        ((files[0],), 9, "takes images of"),
        ((tmp_path / "none.onnx",), None, "cannot be read"),
    ]:
        with pytest.raises(RmpruneError, match=words):
            run_measure_files(RemeasureConfig(runs, image_size=size, measure=QUICK))
    with pytest.raises(ConfigError, match="'eager' reads no ONNX files"):
        run_measure_files(RemeasureConfig(files, measure=replace(QUICK, backends=("eager",))))
    with pytest.raises(ConfigError, match="data_dir is where the images of runs lie"):
        run_measure_files(RemeasureConfig(files, measure=QUICK, data_dir=tmp_path))


def test_what_a_runtime_refuses_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unknown, newer, uneven = residual(), residual(), residual()
    unknown.graph.node[1].op_type, newer.ir_version = "NoSuchOp", 99
    uneven.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(normal(4, 4, 3, 3), "a"))
    for model, said in (
        (unknown, r"\(InvalidGraph: This is an invalid model. .* No Op register"),
        (newer, r"\(Fail: Unsupported model IR version: 99"),
        (uneven, r"Input channels C is not equal to kernel channels"),
    ):
        path = written(model, tmp_path / "a.onnx")
        with pytest.raises(ConfigError, match=said) as raised:
            run_measure_files(RemeasureConfig((path,), measure=QUICK))
        told = str(raised.value)
        assert "\n" not in told and "ONNXRuntimeError" not in told and "export it again, or measure with" in told
    assert capfd.readouterr().err == ""


def channels_last(sizes: list[Any], *, layers: bool = True) -> onnx.ModelProto:
    """Channels last, as in TensorFlow's files: a mean is taken off, a border added, then comes the transpose; or no layer at all."""
    make = onnx.helper.make_node
    weights = {"m": normal(3), "p": np.array([0, 1, 1, 0, 0, 1, 1, 0]), "w": normal(4, 3, 3, 3)}
    nodes = [
        make("Sub", ["x", "m"], ["a"]),
        make("Pad", ["a", "p"], ["b"]),
        make("Transpose", ["b"], ["c"], perm=[0, 3, 1, 2]),
        make("Conv", ["c", "w"], ["d"], kernel_shape=[3, 3]),
        make("Relu", ["d"], ["y"]),
    ]
    return graph_of(nodes if layers else [make("Sub", ["x", "m"], ["y"])], weights, sizes)


@pytest.mark.parametrize(
    ("sizes", "layers", "expected"),
    [
        (["n", "h", "w", 3], True, (20, 20, 3)),
        (["n", "h", "w", "c"], True, (20, 20, 3)),
        (["n", 20, "w", 3], True, (20, 20, 3)),
        ([1, 20, 20, 3], True, (20, 20, 3)),
        (["n", "h", "w", 3], False, (20, 20, 3)),
        (["n", "c", "h", 3], False, (20, 20, 3)),
        (["n", 3, "h", "w"], False, (3, 20, 20)),
    ],
)
def test_images_with_channels_last(tmp_path: Path, sizes: list[Any], layers: bool, expected: tuple[int, ...]) -> None:
    """They were taken for images of 3 rows."""
    path = written(channels_last(sizes, layers=layers), tmp_path / "a.onnx")
    assert _example_shapes([open_onnx(path)], 20) == [expected]
    if layers:
        run_measure_files(RemeasureConfig((path,), measure=replace(QUICK, batch_sizes=(1,)), image_size=20))
        assert read_network(open_onnx(path), 20).examples[0].shape == (2, *expected)
    with pytest.raises(ConfigError, match="takes images of"):
        _example_shapes([open_onnx(written(channels_last([1, 20, 20, 3]), path))], 21)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no")
    for command in (["measure"], ["inspect"], ["convert", "--out", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, str(tmp_path / "a.onnx")])
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and "a.onnx: damaged, or no ONNX file" in said and "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
