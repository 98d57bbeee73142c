"""Each operator on the list, as ONNX Runtime computes it, and each that is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_examples import graph_of, normal, one, residual, written

from rmprune.artifact.describe import describe
from rmprune.config import InspectConfig, NetworkConfig
from rmprune.errors import RmpruneError
from rmprune.onnx.read import ONNX_READERS
from rmprune.onnx.runtime import batch_for, checked_network
from rmprune.onnx.write import write_like
from rmprune.pipelines.convert import run_inspect
from rmprune.removal import remove_residuals

W = normal(6, 4, 3, 3)
INT = np.int64
node = helper.make_node


def conv(**attributes: Any) -> onnx.ModelProto:
    return one("Conv", W, normal(6), **attributes)


def pool(op: str, opset: int = 17, **attributes: Any) -> onnx.ModelProto:
    return one(op, opset=opset, kernel_shape=[3, 3], **attributes)


def resize(scales: Any = None, sizes: Any = None, opset: int = 17, **attributes: Any) -> onnx.ModelProto:
    if scales is not None:
        scales = np.float32([1, 1, *scales])
    return one("Resize", None, scales, *([] if sizes is None else [INT([2, 4, *sizes])]), opset=opset, **attributes)


def between(nodes: list[onnx.NodeProto], sizes: Any = (2, 4, 6, 8), opset: int = 17, **weights: Any) -> onnx.ModelProto:
    return graph_of(nodes, {name: np.asarray(value) for name, value in weights.items()}, list(sizes), opset)


OPERATORS = {
    "conv": conv(),
    "conv, pads": conv(pads=[1, 0, 1, 0]),
    "conv, uneven pads": conv(pads=[0, 1, 2, 1], strides=[2, 2]),
    "conv, same upper": conv(auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv, same lower": conv(auto_pad="SAME_LOWER", strides=[2, 1]),
    "conv, valid": conv(auto_pad="VALID", dilations=[2, 1]),
    "conv, groups": one("Conv", W[:, :2], group=2, kernel_shape=[3, 3]),
    "conv 1-D": one("Conv", normal(2, 4, 3), sizes=(2, 4, 9), pads=[1, 1]),
    "conv 3-D": one("Conv", normal(2, 4, 2, 2, 2), sizes=(2, 4, 3, 3, 3)),
    "transposed": one(
        "ConvTranspose", normal(4, 3, 3, 3), normal(3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 0]
    ),
    "transposed, groups": one("ConvTranspose", normal(4, 2, 2, 2), group=2),
    "batch norm": one("BatchNormalization", *normal(3, 4), abs(normal(4)), epsilon=0.1),
    "batch norm, opset 7": one("BatchNormalization", *normal(3, 4), abs(normal(4)), opset=7),
    "batch norm of vectors": one("BatchNormalization", *normal(3, 4), abs(normal(4)), sizes=(2, 4)),
    "instance norm": one("InstanceNormalization", normal(4), normal(4)),
    "layer norm": one("LayerNormalization", normal(6, 8), normal(6, 8), axis=2),
    "layer norm, no bias": one("LayerNormalization", normal(8)),
    "group norm": one("GroupNormalization", normal(4), normal(4), num_groups=2, opset=21),
    "max pool": pool("MaxPool", strides=[2, 2], pads=[1, 1, 1, 1]),
    "max pool, uneven": pool("MaxPool", pads=[2, 0, 1, 1]),
    "max pool, ceil": pool("MaxPool", strides=[2, 2], ceil_mode=1),
    "max pool, dilated": pool("MaxPool", dilations=[2, 2]),
    "max pool, same": pool("MaxPool", strides=[2, 2], auto_pad="SAME_UPPER"),
    "average": pool("AveragePool", strides=[2, 2], pads=[1, 1, 1, 1]),
    "average, counts": pool("AveragePool", pads=[1, 1, 1, 1], count_include_pad=1),
    "average, uneven": pool("AveragePool", pads=[0, 1, 2, 1], count_include_pad=1),
    "average, ceil": pool("AveragePool", strides=[2, 2], ceil_mode=1),
    "global average": one("GlobalAveragePool"),
    "global average 1-D": one("GlobalAveragePool", sizes=(2, 4, 9)),
    "global max": one("GlobalMaxPool"),
    "gemm": one("Gemm", normal(5, 4), normal(5), sizes=(2, 4), transB=1),
    "gemm, scaled": one("Gemm", normal(4, 5), normal(1), sizes=(2, 4), alpha=0.5, beta=2.0),
    "matmul": one("MatMul", normal(8, 3)),
    "matmul of two": between([node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), node("MatMul", ["x", "t"], ["y"])]),
    "matmul and bias": between(
        [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"])], w=normal(8, 3), b=normal(3)
    ),
    "relu": one("Relu"),
    "clip": one("Clip", np.float32(-0.5), np.float32(1)),
    "clip below": one("Clip", np.float32(0.5)),
    "relu6, opset 6": one("Clip", opset=7, min=0.0, max=6.0),
    "clip without limits": one("Clip"),
    "clip at zero": one("Clip", np.float32(0)),
    "hard swish": one("HardSwish"),
    "hard sigmoid": one("HardSigmoid", alpha=1 / 6),
    "hard sigmoid 0.2": one("HardSigmoid"),
    "sigmoid": one("Sigmoid"),
    "tanh": one("Tanh"),
    "leaky": one("LeakyRelu", alpha=0.3),
    "elu": one("Elu", alpha=0.7),
    "selu": one("Selu"),
    "celu": one("Celu", alpha=0.7),
    "softplus": one("Softplus"),
    "softsign": one("Softsign"),
    "mish": one("Mish", opset=18),
    "gelu": one("Gelu", opset=20, approximate="tanh"),
    "threshold": one("ThresholdedRelu", alpha=0.4),
    "prelu": one("PRelu", normal(4, 1, 1)),
    "prelu, one": one("PRelu", normal(1)),
    "erf": one("Erf"),
    "abs": one("Abs"),
    "neg": one("Neg"),
    "exp": one("Exp"),
    "log": between([node("Abs", ["x"], ["a"]), node("Log", ["a"], ["y"])]),
    "sqrt": between([node("Abs", ["x"], ["a"]), node("Sqrt", ["a"], ["y"])]),
    "add a number": one("Add", np.float32(0.1)),
    "add channels": one("Add", normal(4, 1, 1)),
    "sub from": between([node("Sub", ["w", "x"], ["y"])], w=normal(1)),
    "mul by itself": between([node("Mul", ["x", "x"], ["y"])]),
    "div": one("Div", np.float32(3)),
    "one over": between([node("Div", ["w", "x"], ["y"])], w=normal(1)),
    "reciprocal": one("Reciprocal"),
    "pow": one("Pow", np.float32(2)),
    "max": one("Max", np.float32(0.1)),
    "min of three": between([node("Min", ["x", "w", "v"], ["y"])], w=normal(8), v=normal(4, 1, 1)),
    "sum": between([node("Sum", ["x", "x", "w"], ["y"])], w=normal(8)),
    "sum of one": one("Sum"),
    "flatten vectors": one("Flatten", sizes=(2, 4)),
    "reshape to itself": one("Reshape", INT([0, 4, 6, 8])),
    "reshape to vectors": one("Reshape", INT([0, -1])),
    "squeeze all": one("Squeeze", sizes=(2, 4, 1, 1)),
    "mean of no axes": one("ReduceSum", noop_with_empty_axes=1),
    "resize by one": resize([1, 1], mode="linear"),
    "concat": between([node("Concat", ["x", "x"], ["y"], axis=-3)]),
    "mean": one("ReduceMean", axes=[2, 3]),
    "mean, opset 18": one("ReduceMean", INT([1]), opset=18, keepdims=0),
    "sum over": one("ReduceSum", INT([-1])),
    "max over": one("ReduceMax", axes=[1], keepdims=0),
    "min over": one("ReduceMin", axes=[3]),
    "softmax": one("Softmax", axis=1),
    "softmax, opset 11": one("Softmax", opset=11, axis=3),
    "log softmax": one("LogSoftmax"),
    "flatten": one("Flatten"),
    "reshape": one("Reshape", INT([0, 8, -1])),
    "reshape, batch": one("Reshape", INT([-1, 2, 2, 6, 8])),
    "squeeze": one("Squeeze", INT([2, 3]), sizes=(2, 4, 1, 1)),
    "squeeze one": one("Squeeze", opset=11, axes=[2], sizes=(2, 4, 1, 5)),
    "unsqueeze": one("Unsqueeze", INT([2, -1])),
    "unsqueeze, opset 11": one("Unsqueeze", opset=11, axes=[1]),
    "transpose": one("Transpose", perm=[0, 2, 3, 1]),
    "slice": one("Slice", INT([1]), INT([2**62]), INT([1])),
    "slice, steps": one("Slice", INT([0, -5]), INT([6, -1]), INT([2, 3]), INT([2, 3])),
    "slice, opset 9": one("Slice", opset=9, starts=[1], ends=[-1], axes=[3]),
    "gather one": one("Gather", INT(-1), axis=1),
    "gather": one("Gather", INT([2, 0, -1]), axis=2),
    "pad": one("Pad", INT([0, 0, 1, 0, 0, 0, 2, 1]), np.float32(0.5)),
    "pad, opset 9": one("Pad", opset=9, pads=[0, 1, 0, 0, 0, 2, 0, 0]),
    "pad, reflect": one("Pad", INT([0, 0, 1, 2, 0, 0, 2, 1]), mode="reflect"),
    "pad, edge": one("Pad", INT([0, 0, 1, 0, 0, 0, 2, 1]), mode="edge"),
    "pad, axes": one("Pad", INT([1, 0]), None, INT([3]), opset=18),
    "identity": one("Identity"),
    "dropout": one("Dropout", np.float32(0.5)),
    "cast": one("Cast", to=1),
    "pixel shuffle": one("DepthToSpace", blocksize=2, mode="CRD"),
    "nearest": resize([2, 3], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    "nearest to sizes": resize(
        sizes=[9, 5], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    ),
    "nearest, default": resize([2, 2], mode="nearest"),
    "linear": resize([2, 1.5], mode="linear"),
    "linear, corners": resize(sizes=[11, 9], mode="linear", coordinate_transformation_mode="align_corners"),
    "cubic": resize([2, 2], mode="cubic"),
    "upsample": one("Upsample", np.float32([1, 1, 2, 2]), opset=9, mode="nearest"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_read_as_onnx_runtime_computes_it(name: str, tmp_path: Path) -> None:
    network = checked_network(written(OPERATORS[name], tmp_path / "m.onnx"))
    torch.manual_seed(0)
    inputs = batch_for(network.file, network.examples, seed=3)
    assert network.model(*inputs).isfinite().any()
    describe(network.model)  # it can be kept as an artifact


def test_every_operator_on_the_list_is_compared() -> None:
    named = {node.op_type for model in OPERATORS.values() for node in model.graph.node}
    assert named | {"Split", "Dropout"} >= ONNX_READERS.keys()


def test_pieces_sizes_and_constants_are_followed(tmp_path: Path) -> None:
    """A channel shuffle as torch writes it for any batch, pieces, and anchors made of sizes."""
    nodes = [
        node("Split", ["x"], ["p", "q"], axis=1),
        node("Concat", ["q", "p"], ["c"], axis=1),
        node("Shape", ["c"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Unsqueeze", ["n", "zeros"], ["n1"]),
        node("Constant", [], ["rest"], value_ints=[2, 2, 6, 8]),
        node("Concat", ["n1", "rest"], ["sizes"], axis=0),
        node("Reshape", ["c", "sizes"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["t", "back"], ["u"]),
        node("Gather", ["s", "three"], ["w"]),
        node("Range", ["zero", "w", "one"], ["g"]),
        node("Cast", ["g"], ["f"], to=1),
        node("Add", ["u", "f"], ["y"]),
    ]
    weights = {"zero": INT(0), "zeros": INT([0]), "three": INT(3), "one": INT(1), "back": INT([0, 4, 6, 8])}
    network = checked_network(written(graph_of(nodes, weights, ["n", 4, 6, 8]), tmp_path / "m.onnx"))
    assert network.model(torch.randn(5, 4, 6, 8)).shape == (5, 4, 6, 8)


def test_layers_have_names_of_their_place_and_biases_join(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "1"], ["a"], name="/layer1/layer1.0/conv1/Conv"),
        node("Add", ["a", "bias"], ["b"]),
        node("Conv", ["b", "stem.c.weight"], ["y"], name="Conv_3"),
    ]
    weights = {"1": W, "bias": normal(1, 6, 1, 1), "stem.c.weight": normal(2, 6, 1, 1)}
    model = checked_network(written(graph_of(nodes, weights, [2, 4, 6, 8]), tmp_path / "m.onnx")).model
    assert dict(model.named_children()).keys() == {"layer1_0_conv1", "stem_c"}
    assert model.layer1_0_conv1.bias.shape == (6,)


@pytest.mark.parametrize("word", ["class", "None", "self", "training", "meta"])
@pytest.mark.parametrize("place", ["input", "node"])
def test_names_may_be_words_of_python_or_of_torch(word: str, place: str, tmp_path: Path) -> None:
    model = residual()
    if place == "node":
        model.graph.node[0].name = word
    else:
        model.graph.input[0].name = model.graph.node[0].input[0] = word
    network = checked_network(written(model, tmp_path / "a.onnx"))
    removed = remove_residuals(network.model, network.examples)
    assert removed.removed and write_like(network, removed.model, tmp_path / "new.onnx") < 1e-5


def test_gelu_written_out_is_a_layer(tmp_path: Path) -> None:
    nodes = [
        node("Div", ["x", "root"], ["a"]),
        node("Erf", ["a"], ["b"]),
        node("Add", ["b", "one"], ["c"]),
        node("Mul", ["x", "c"], ["d"]),
        node("Mul", ["d", "half"], ["y"]),
    ]
    values = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    model = checked_network(written(between(nodes, **values), tmp_path / "m.onnx")).model
    assert [type(layer) for layer in model.children()] == [torch.nn.GELU]


def test_residuals_are_called_by_the_place_that_either_exporter_of_torch_says(tmp_path: Path) -> None:
    for name, scopes in (("/layer1/layer1.0/Add", ""), ("node_add_65", "['', 'layer1', 'layer1.0', 'add_65']")):
        model = residual()
        model.graph.node[5].name = name
        model.graph.node[5].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
        assert "layer1_0" in dict(checked_network(written(model, tmp_path / "m.onnx")).model.named_children())


def edited(change: Any) -> onnx.ModelProto:
    model = residual()
    change(model)
    return model


def custom(model: onnx.ModelProto) -> None:
    model.graph.node[1].domain = "com.acme"


def typed(model: onnx.ModelProto, kind: int) -> None:
    model.graph.input[0].type.tensor_type.elem_type = kind


def two_inputs(*sizes: list[int]) -> onnx.ModelProto:
    model = graph_of([node("Add", ["x", "other"], ["y"])], {}, sizes[0])
    model.graph.input.append(helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, sizes[1]))
    return model


REFUSED = {
    "another domain": (edited(custom), "an operator of com.acme, which is not ONNX's own"),
    "control flow": (edited(lambda m: setattr(m.graph.node[1], "op_type", "If")), "If 2: control flow"),
    "a quantised file": (
        edited(lambda m: setattr(m.graph.node[1], "op_type", "QuantizeLinear")),
        "quantised; give the one in float32",
    ),
    "a function": (edited(lambda m: m.functions.add(name="f", domain="x")), "functions of its own"),
    "an unknown operator": (
        edited(lambda m: setattr(m.graph.node[1], "op_type", "LSTM")),
        "not on the list of those that are read: LSTM",
    ),
    "an unknown attribute": (one("Relu", alpha=1.0), "Relu n: its attribute alpha is not known"),
    "one output twice": (
        edited(lambda m: m.graph.output.append(m.graph.output[0])),
        "its output scores/out:0 stands 2 times among the outputs; leave one",
    ),
    "an old opset": (edited(lambda m: setattr(m.opset_import[0], "version", 6)), "its opset is 6, read are 7 to"),
    "layers in two formats": (
        edited(lambda m: typed(m, 10)),
        r"compute in float16 .*and float32 .*give the file in float32",
    ),
    "bfloat16": (edited(lambda m: typed(m, 16)), "its input image:0 is bfloat16; .*export it in float32 or float16"),
    "a circle": (edited(lambda m: m.graph.node[0].input.__setitem__(0, "2")), "reads 2, which nothing before it gives"),
    "bytes": (edited(lambda m: typed(m, 2)), r"its input image:0 is uint8; .*extract_model"),
    "no opset": (edited(lambda m: m.ClearField("opset_import")), "names no opset"),
    "a newer IR version": (
        edited(lambda m: setattr(m, "ir_version", 99)),
        r"refuses it \(Unsupported model IR version: 99",
    ),
    "a sequence": (
        edited(lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent()),
        "is sequence; taken are",
    ),
    "strings": (edited(lambda m: setattr(m.graph.initializer[0], "data_type", 8)), "tensor a is string"),
    "too few values": (
        edited(lambda m: m.graph.initializer[0].dims.__setitem__(0, 5)),
        "holds another number of values",
    ),
    "huge": (edited(lambda m: m.graph.initializer[0].dims.__setitem__(0, 2**39)), "another number of values"),
    "an endless input": (
        edited(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 2**63 - 1)),
        "is too large",
    ),
    "a negative size": (edited(lambda m: m.graph.initializer[0].dims.__setitem__(0, -4)), "has sizes"),
    "sizes that contradict": (edited(lambda m: m.graph.node[2].input.__setitem__(1, "a")), "does not fit 4 channels"),
    "a missing weight": (
        edited(lambda m: m.graph.node[2].input.__setitem__(1, "q")),
        "reads q, which nothing before it gives",
    ),
    "a name given twice": (
        edited(lambda m: m.graph.node.insert(2, node("Relu", ["1"], ["2"]))),
        "gives 2, which is there already",
    ),
    "a computed weight": (between([node("Conv", ["x", "x"], ["y"])]), "its weight is computed while it runs"),
    "a mixed batch": (one("Reshape", INT([16, 24])), r"it makes \[16, 24\] of \[3, 4, 6, 8\]"),
    "reshape by values": (
        between([node("Cast", ["x"], ["c"], to=7), node("Reshape", ["x", "c"], ["y"])]),
        "a cast|to=7",
    ),
    "a huge map": (one("Pad", INT([0, 0, 9999, 9999] * 2)), "give a smaller image size"),
    "resize of tf": (
        resize([2, 2], mode="linear", coordinate_transformation_mode="tf_half_pixel_for_nn"),
        "is not what torch computes",
    ),
    "nearest that rounds": (resize([1.5, 1.5], mode="nearest"), "is not what torch computes"),
    "an average of its border": (pool("AveragePool", pads=[0, 0, 1, 1]), "count_include_pad=0"),
    "training": (
        one("BatchNormalization", *normal(3, 4), abs(normal(4)), training_mode=1),
        "training_mode=1 is not read, only 0; export the network in eval mode",
    ),
    "training of old": (
        between([node("BatchNormalization", [*"xabcd"], [*"ymvsw"])], opset=9, **dict.fromkeys("abcd", abs(normal(4)))),
        "as in training; export the network in eval mode",
    ),
    "softmax of old": (one("Softmax", opset=11, axis=1), "before opset 13"),
    "an addition of one": (one("Add"), "its second input is missing"),
    "another cast": (one("Cast", to=7), "to=7"),
    "a cast that rounds": (
        between([node("Cast", ["x"], ["c"], to=10), node("Cast", ["c"], ["y"], to=1)]),
        "what was read of it differs",
    ),
    "axes beyond": (one("ReduceMean", axes=[4]), "its axes are"),
    "a squeezed map": (one("Squeeze", INT([2])), "it takes away axes"),
    "no values": (one("Reshape", INT([0, 4, 6, 0]), allowzero=1), "makes a tensor without values"),
    "uneven pieces": (one("Split", INT([1, 1]), axis=1), "it cuts 4 into pieces"),
    "indices beyond": (one("Gather", INT([4]), axis=1), "reach beyond the 4 that there are"),
    "pads for fewer axes": (one("Pad", INT([1, 1])), "its pads are"),
    "pads of no kind": (one("Pad", INT([0, 0, -1, 0] * 2), mode="reflect"), "mode='reflect' with pads"),
    "strides of one axis": (conv(strides=[1]), "its strides are"),
    "negative pads": (conv(pads=[-1, 0, 0, 0]), "its pads are"),
    "no such padding": (conv(auto_pad="SOME"), "auto_pad='SOME' is not read"),
    "transposed to a shape": (
        one("ConvTranspose", normal(4, 3, 3, 3), output_shape=[8, 10]),
        "write its pads and output",
    ),
    "transposed, uneven": (one("ConvTranspose", normal(4, 3, 3, 3), pads=[0, 0, 1, 1]), "which differ"),
    "an average with holes": (pool("AveragePool", dilations=[2, 2], opset=19), "its dilations are"),
    "a ceiling over pads": (
        pool("AveragePool", pads=[1, 1, 1, 1], ceil_mode=1, count_include_pad=1),
        "differs between runtimes and opsets",
    ),
    "group norm of old": (one("GroupNormalization", normal(2), normal(2), num_groups=2, opset=18), "before opset 21"),
    "layer norm of others": (one("LayerNormalization", normal(4)), "its scale has sizes"),
    "gemm of maps": (one("Gemm", normal(8, 5)), "read are vectors"),
    "slopes of rows": (one("PRelu", normal(6, 1)), "its slope has sizes"),
    "hard sigmoid 0.4": (one("HardSigmoid", beta=0.4), "beta=0.4"),
    "selu of others": (one("Selu", alpha=1.0), "its alpha is not that of the paper"),
    "resized channels": (one("Resize", None, np.float32([1, 2, 1, 1])), "read is a change of height and width"),
    "another number of each": (two_inputs([3, 5], [5]), r"begin with other numbers \(x \[3, 5\], other \[5\]\)"),
    "one image alone": (
        one("Concat", normal(1, 4, 1, 1), axis=2, sizes=(1, 4, 6, 1)),
        "batches of 1 alone: export it with an open",
    ),
    "no pixels": (one("Relu", sizes=(1, 4, 0, 8)), "has an axis of size 0"),
    "a constant output": (between([node("Identity", ["w"], ["y"])], w=W), "does not depend on its inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model, words = REFUSED[name]
    with pytest.raises(RmpruneError, match=rf"m\.onnx.*({words})") as error:
        checked_network(written(model, tmp_path / "m.onnx"))
    assert "\n" not in str(error.value)


def test_a_small_file_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is of a size that is taken, and there are many; the weights of a file may be taken again."""
    monkeypatch.setattr("rmprune.onnx.drawing.MOST_OF_ALL", 1000)
    make = helper.make_node
    nodes = [make("ConstantOfShape", ["sizes"], [f"c{i}"]) for i in range(20)]
    nodes += [make("Add", ["x" if i == 0 else f"y{i}", f"c{i}"], [f"y{i + 1}"]) for i in range(20)]
    nodes += [make("Identity", ["y20"], ["y"])]
    model = graph_of(nodes, {"sizes": np.array([4, 6, 8])}, ["n", 4, 6, 8])
    with pytest.raises(RmpruneError, match=r"ConstantOfShape.*constants up to it is too large"):
        checked_network(written(model, tmp_path / "a.onnx"))
    checked_network(written(residual(), tmp_path / "b.onnx"))


def with_dead_ends() -> onnx.ModelProto:
    model = residual()
    model.graph.node.extend([node("NonZero", ["7"], ["dead"])])
    model.graph.initializer.append(numpy_helper.from_array(normal(2).astype(np.float16), "unread"))
    model.graph.input.append(helper.make_tensor_value_info("unread", onnx.TensorProto.FLOAT16, [2]))
    model.opset_import.add(domain="ai.onnx", version=17)
    return model


def with_a_second_input(batch: object) -> onnx.ModelProto:
    model = residual()
    model.graph.input.append(helper.make_tensor_value_info("second", onnx.TensorProto.FLOAT, [batch, 5]))
    model.graph.node[-1].output[0] = "first"
    model.graph.node.append(node("Add", ["first", "second"], ["scores/out:0"]))
    return model


@pytest.mark.parametrize(
    "model", [with_dead_ends(), with_a_second_input(1), with_a_second_input("batch")], ids=["dead ends", "one", "open"]
)
def test_what_exporters_leave_in_files(model: onnx.ModelProto, tmp_path: Path) -> None:
    network = checked_network(written(model, tmp_path / "m.onnx"))
    removed = remove_residuals(network.model, network.examples)
    assert removed.removed and write_like(network, removed.model, tmp_path / "new.onnx") < 1e-5


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html><html>",
        b"\x08\x08",
        b"no file",
        residual().SerializeToString()[:300],
        *(
            residual().SerializeToString().replace(name, b"\xff" * len(name))
            for name in (b"camera", b"image:0", b"block")
        ),
    ],
    ids=["empty", "page", "header", "text", "cut", "name", "input", "node"],
)
def test_what_is_no_whole_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(RmpruneError, match=re.escape(str(tmp_path / "m.onnx"))):
        checked_network(tmp_path / "m.onnx")


def external(tmp_path: Path, location: str, length: int | None = None) -> Path:
    """A file whose first weight lies in another file."""
    model = residual()
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value=str(length or len(data)))
    (tmp_path / "in").mkdir()
    for folder in (tmp_path, tmp_path / "in"):
        (folder / "weights").write_bytes(data)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "weights")
    (tmp_path / "in" / "circle").symlink_to("circle")
    return written(model, tmp_path / "in" / "m.onnx")


def test_external_data_is_read(tmp_path: Path) -> None:
    plain = checked_network(written(residual(), tmp_path / "m.onnx"))
    network = checked_network(external(tmp_path, "weights"))
    assert torch.equal(network.model(network.examples[0]), plain.model(network.examples[0]))


@pytest.mark.parametrize(
    ("location", "length", "words"),
    [
        ("../weights", None, "outside"),
        ("/etc/passwd", None, "outside"),
        ("link", None, "outside"),
        ("circle", None, "loop"),
        ("", None, "outside"),
        ("none", None, "is missing"),
        (".", None, "outside|missing"),
        ("weights", 4, "shorter"),
        ("weights", 2**40, "shorter"),
        ("a\0b", None, "null byte"),
    ],
)
def test_external_data_stays_in_its_folder(location: str, length: int | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(RmpruneError, match=rf"m\.onnx.*({words})"):
        checked_network(external(tmp_path, location, length))


def test_a_file_that_is_read_wrongly_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ONNX_READERS, "Relu", ONNX_READERS["Tanh"])
    with pytest.raises(RmpruneError, match="what was read of it differs from the file"):
        checked_network(written(residual(), tmp_path / "m.onnx"))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RmpruneError, match="cannot be read"):
        checked_network(tmp_path / "none.onnx")


def test_inspect_shows_the_residuals_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(residual(), tmp_path / "m.onnx")
    (block,) = run_inspect(InspectConfig(NetworkConfig(str(path))))
    assert (block.name, block.removable, block.form, block.reserved) == ("block", True, "free", 4)
    assert "removable" in capsys.readouterr().out
    with pytest.raises(RmpruneError, match="is an ONNX file, which --num-classes cannot change"):
        run_inspect(InspectConfig(NetworkConfig(str(path), num_classes=3)))
    with pytest.raises(RmpruneError, match=r"takes images of \[8, 8\] pixels"):
        run_inspect(InspectConfig(NetworkConfig(str(path), image_size=9)))
