"""An ONNX file as a network of torch layers, by a closed list of operators: what is not on it is refused by name, never approximated."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from rmprune.errors import ArtifactError, ConfigError, UnsupportedModel, first_line
from rmprune.graph.obstacle import Obstacle
from rmprune.onnx.constants import FOLDED, Array, fold
from rmprune.onnx.drawing import Call, Drawing, Known, OnnxValue, shapes
from rmprune.onnx.file import OnnxFile, OnnxInput
from rmprune.onnx.functions import FUNCTION_READERS
from rmprune.onnx.idioms import join_idioms
from rmprune.onnx.layers import LAYER_READERS
from rmprune.onnx.layout import channel_axis
from rmprune.onnx.order import printable, said_of
from rmprune.onnx.windows import WINDOW_READERS

ONNX_READERS = WINDOW_READERS | LAYER_READERS | FUNCTION_READERS
_QUANTISED = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
_SCOPES = "pkg.torch.onnx.name_scopes"
_SELF = ("Constant", "Shape")
_TIMES = 4  # may a file's weights be taken again: in another format, in another order, as a tensor that the graph reads
MOST_PIXELS = 2**24  # of an input


@dataclass(frozen=True)
class OnnxNetwork:
    """What was read: the network in eval mode, and one example of its inputs, two images each."""

    file: OnnxFile
    model: fx.GraphModule
    examples: tuple[Tensor, ...]


def read_network(
    file: OnnxFile, image_size: int | None = None, channels: int = 3, like: tuple[Tensor, ...] | None = None
) -> OnnxNetwork:
    """The network of a file: torch.fx graph and stock layers, for any number of images, in the number format that the file computes in.

    `image_size`, `channels`: where the file leaves them open (224, 3); `like`: inputs whose sizes are taken instead. Raises
    UnsupportedModel for an operator, an attribute or a use that is not on the list, and ArtifactError where the file contradicts itself;
    both name the node.
    """
    if len({entry.sizes[0] for entry in file.inputs} - {None}) > 1:
        said = ", ".join(f"{printable(entry.name)} {list(entry.sizes)}" for entry in file.inputs)
        raise UnsupportedModel(
            f"{file.path}: its inputs begin with other numbers ({said}), where read are as many images of each; leave the part out that "
            "joins them (onnx.utils.extract_model)"
        )
    for node in file.nodes:
        if "Quantize" in node.op_type or node.op_type in _QUANTISED:
            raise UnsupportedModel(
                f"{file.path}: {said_of(node)}: the file is quantised; give the one in float32 that it was made of, and quantise the result"
            )
    unknown = sorted({node.op_type for node in file.nodes} - ONNX_READERS.keys() - FOLDED.keys() - set(_SELF))
    if unknown:
        named = ", ".join(map(printable, unknown[:10]))
        raise UnsupportedModel(
            f"{file.path}: has operators that are not on the list of those that are read: {named}; leave their part out of the file "
            "(onnx.utils.extract_model), or remove residuals before exporting (convert MODEL)"
        )
    sizes = [tuple(x.shape[1:]) for x in like or ()] or [
        _sizes(file, entry, image_size, channels) for entry in file.inputs
    ]
    drawing, wide = Drawing(), torch.float64 if file.dtype == torch.float64 else torch.float32
    values: dict[str, OnnxValue | None] = {"": None}
    for entry, size in zip(file.inputs, sizes, strict=True):
        first = fixed_batch(file) or 2
        blanks = tuple(torch.empty(count, *size, device="meta", dtype=wide) for count in (first, first + 1))
        values[entry.name] = drawing.input(entry.name, (blanks[0], blanks[1]))
    for tensor in file.proto.graph.initializer:
        array = _wide(file, file.array(tensor))
        values[tensor.name] = Known(array, array)
        drawing.room += _TIMES * array.size
    for node in file.nodes:
        _read(file, node, values, drawing)
    found = []
    for entry in file.outputs:
        value = values.get(entry.name)
        if not isinstance(value, fx.Node):
            raise UnsupportedModel(
                f"{file.path}: its output {printable(entry.name)} does not depend on its inputs; leave it out"
            )
        found.append(value)
    drawing.graph.output(found[0] if len(found) == 1 else tuple(found))
    model = fx.GraphModule(drawing.root, drawing.graph, class_name="OnnxGraph")
    join_idioms(model)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    model.recompile()
    generator = torch.Generator().manual_seed(0)
    examples = (torch.randn(2, *size, generator=generator) for size in sizes)
    return OnnxNetwork(file, model.eval().to(file.dtype), tuple(x.to(file.dtype) for x in examples))


def _sizes(file: OnnxFile, entry: OnnxInput, image_size: int | None, channels: int) -> tuple[int, ...]:
    """One example's sizes, without the batch; what the file leaves open is taken from the settings."""
    given, at = entry.sizes[1:], channel_axis(file, entry) - 1
    pixels = [n for axis, n in enumerate(given) if axis != at]
    size = 224 if image_size is None else image_size
    if size < 1 or channels < 1:
        raise ConfigError(f"image_size is {size} and in_channels {channels}; both must be at least 1")
    if image_size is not None and pixels and None not in pixels and set(pixels) != {size}:
        raise ConfigError(
            f"{file.path} takes images of {pixels} pixels, which --image-size {size} cannot change; leave it out"
        )
    found = tuple(n or (channels if axis == at and len(given) > 1 else size) for axis, n in enumerate(given))
    if math.prod(found) > MOST_PIXELS or (entry.sizes[0] or 1) > 2**12:
        raise UnsupportedModel(
            f"{file.path}: its input {printable(entry.name)} of sizes {list(entry.sizes)} is too large"
        )
    return found


def _wide(file: OnnxFile, array: Array) -> Array:
    """A constant in the format that the network is read in: float64 for a file that computes in it, else nothing below float32."""
    if file.dtype == torch.float64 and array.dtype in (np.float16, np.float32):
        return array.astype(np.float64)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _read(file: OnnxFile, node: onnx.NodeProto, values: dict[str, OnnxValue | None], drawing: Drawing) -> None:
    """Reads one node, and notes what it gives."""
    attributes = {a.name: _attribute(file, a) for a in node.attribute}
    inputs = [values.get(name) for name in node.input]
    missing = [name for name in node.input if name not in values]
    try:
        if missing:
            raise Obstacle(f"it reads {printable(missing[0])}, a second result that is not read")
        found = _result(file, node, inputs, attributes, drawing)
    except Obstacle as obstacle:
        raise UnsupportedModel(f"{file.path}: {said_of(node)}: {str(obstacle)[:500]}") from None
    except Exception as error:  # torch and numpy complain in many ways of sizes that do not fit
        only = (
            f", or it holds for batches of {n} alone: export it with an open batch" if (n := fixed_batch(file)) else ""
        )
        raise ArtifactError(
            f"{file.path}: {said_of(node)}: {first_line(error)}; the file contradicts itself{only or ', export it again'}"
        ) from error
    for name, value in zip(node.output, found, strict=False):
        if name:
            values[name] = value


def _result(
    file: OnnxFile, node: onnx.NodeProto, inputs: list[OnnxValue | None], attributes: dict[str, Any], drawing: Drawing
) -> list[OnnxValue | None]:
    if node.op_type == "Constant":
        array = _wide(file, _constant(attributes))
        return [Known(array, array)]
    if node.op_type == "Shape" and inputs and inputs[0] is not None:
        start, end = attributes.pop("start", 0), attributes.pop("end", None)
        both = shapes(inputs[0]) if isinstance(inputs[0], fx.Node) else [side.shape for side in inputs[0]]
        one, other = (torch.tensor(shape[start:end], dtype=torch.int64).numpy() for shape in both)
        return [Known(one, other)]
    given = [value for value in inputs if value is not None]
    if node.op_type in FOLDED and given and all(isinstance(value, Known) for value in given):
        sides = [[None if value is None else value[k] for value in inputs] for k in (0, 1)]  # type: ignore[index]
        same = all(value.constant for value in given)  # type: ignore[union-attr]
        one, *more = (_folded(file, node.op_type, side, attributes, drawing) for side in (sides[:1] if same else sides))
        return [Known(one, more[0] if more else one)]
    if node.op_type not in ONNX_READERS:
        raise Obstacle("it is read of sizes and constants only, not of images")
    call = Call(
        node.op_type, _layer_name(node), file.opset, inputs, attributes, drawing, len(node.output), fixed_batch(file)
    )
    found = ONNX_READERS[node.op_type](call)
    if call.attributes:
        raise Obstacle(f"its attribute {printable(next(iter(call.attributes)))} is not known")
    return found if isinstance(found, list) else [found]


def _folded(file: OnnxFile, op: str, inputs: list[Array | None], attributes: dict[str, Any], drawing: Drawing) -> Array:
    """What an operator gives for known values; counted where that is no view of one of them."""
    found = _wide(file, fold(op, inputs, attributes))
    if not any(value is not None and np.may_share_memory(found, value) for value in inputs):
        drawing.spend(found.size)
    return found


def fixed_batch(file: OnnxFile) -> int | None:
    """The number of images that a file takes; None where it leaves that open. An input that does is given as many as one that says."""
    return next((entry.sizes[0] for entry in file.inputs if entry.sizes[0]), None)


def _attribute(file: OnnxFile, attribute: onnx.AttributeProto) -> Any:
    if attribute.type == onnx.AttributeProto.TENSOR:
        return file.array(attribute.t)
    value = onnx.helper.get_attribute_value(attribute)
    return list(value) if not isinstance(value, int | float | bytes) else value


def _constant(attributes: dict[str, Any]) -> Array:
    kinds = {
        "value": None,
        "value_float": "float32",
        "value_int": "int64",
        "value_floats": "float32",
        "value_ints": "int64",
    }
    names = [name for name in attributes if name in kinds]
    if len(names) != 1 or len(attributes) != 1:
        raise Obstacle(f"a constant given as {', '.join(map(printable, attributes)) or 'nothing'} is not read")
    value = attributes[names[0]]
    return value if names[0] == "value" else torch.tensor(value, dtype=getattr(torch, str(kinds[names[0]]))).numpy()


def _layer_name(node: onnx.NodeProto) -> str:
    """A name by the place in the network: of torch's scopes (/layer1/layer1.0/conv1/Conv), of the weight, or of the node."""
    scopes = [part for part in node.name.split("/") if part]
    if len(scopes) > 1:
        inner = [part for part, after in pairwise(scopes) if not after.startswith(f"{part}.")]
        return ".".join(inner)
    weight = re.fullmatch(r"(.+)\.weight", node.input[1]) if len(node.input) > 1 else None
    said = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    around = filter(None, re.findall(r"'([^']*)'", said)[:-1])  # torch's newer exporter: ['', 'layer1.0', 'add_65']
    return weight[1] if weight else [node.name or next(iter(node.output), "") or node.op_type, *around][-1]
