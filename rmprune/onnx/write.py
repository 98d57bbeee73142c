"""A network written as the ONNX file that it came from says: opset, names, open sizes, metadata; external data where it is large."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from rmprune.errors import NotEquivalent, RmpruneError, UnsupportedModel, first_line
from rmprune.graph.build import destination_of
from rmprune.graph.fold import fold_batch_norms
from rmprune.graph.network import free_name
from rmprune.onnx.bare import Weights, bare_graph, write_proto
from rmprune.onnx.compare import as_tensors, in_format, named_outputs, outputs_of
from rmprune.onnx.file import OnnxFile, open_onnx
from rmprune.onnx.layout import channel_axis
from rmprune.onnx.read import OnnxNetwork, fixed_batch, read_network
from rmprune.onnx.runtime import batch_for, refuse_difference, run_file

logger = logging.getLogger("rmprune")
_Axes = set[tuple[int, int]]  # the numbers of an input and of its axis
_OTHER_SIZES: tuple[Callable[[int, int], int], ...] = (
    lambda size, odd: size + 1,
    lambda size, odd: max(1, size // 2) + odd,
    lambda size, odd: size + 32,
    lambda size, odd: size + (6, 17)[odd],
    lambda size, odd: max(1, size // 4) + odd,
    lambda size, odd: max(1, size // 8) + odd,
)
"""On which open sizes are tried, of size and parity of an axis: larger and smaller, of other parity and another shape."""
_ALONE = 2  # of these, the sizes on which an axis is tried by itself


def write_like(network: OnnxNetwork, model: nn.Module, path: Path) -> float:
    """Writes `model`, which computes what `network` does, as an ONNX file like the one that was read; returns its error.

    Opset, names and sizes of inputs and outputs, name and text of the graph, metadata_props and IR version are those of the file; over
    EXTERNAL_OVER bytes the weights lie in PATH.data beside it. The error is the largest |difference| of the two files in ONNX
    Runtime, over the largest output, for other batches as well where the file leaves them open. Sizes of images that it leaves open
    stay open where both files agree on every other size that is tried and that the file itself takes, else they are those of the examples,
    and the log says so.

    Raises NotEquivalent where they differ by more than their format rounds, UnsupportedModel where the exporter cannot write the network.
    """
    file = network.file
    proto, weights = _exported(network, model)
    weights = _rename(proto, weights, file)
    _tell(proto, file.proto)
    new = _write(proto, weights, path)
    error = _compare(network, new, 0)
    if not _agree_on_other_sizes(network, new):
        _fix_sizes(proto, network)
        new = _write(proto, weights, path)
        logger.warning(
            "%s: what it computes depends on the size of its images, which is fixed in the new file (--image-size says another)",
            file.path,
        )
    return max(error, _compare(network, new, 1))


def _exported(network: OnnxNetwork, model: nn.Module) -> tuple[onnx.ModelProto, Weights]:
    """The graph as torch exports it, inputs i0, ... and outputs o0, ..., and its weights by name, which it does not hold."""
    file = network.file
    examples = batch_for(file, network.examples)
    wide = in_format(model, torch.float32 if file.dtype == torch.float16 else file.dtype)
    folded = fold_batch_norms(wide, as_tensors(examples, destination_of(wide).dtype)).cpu().to(file.dtype)
    folded = folded.to(memory_format=torch.contiguous_format)
    if not all(bool(value.isfinite().all()) for value in folded.state_dict().values() if value.is_floating_point()):
        raise NotEquivalent(
            f"{file.path}: weights of the new network leave the range of float16 (65504); give the file in float32"
        )
    if any(entry.dtype != file.dtype for entry in (*file.inputs, *file.outputs)):
        folded = _Cast(folded, file)
    inputs, outputs = ([f"{kind}{i}" for i in range(len(of))] for kind, of in (("i", file.inputs), ("o", file.outputs)))
    free = {
        name: {axis: f"{name}_{axis}" for axis, size in enumerate(entry.sizes) if size is None}
        for name, entry in zip(inputs, file.inputs, strict=True)
    }
    try:
        given = tuple(x.to(entry.dtype) for x, entry in zip(examples, file.inputs, strict=True))
        return bare_graph(folded, given, (inputs, outputs), free, file.opset)
    except Exception as error:  # neither has an error family of its own
        raise UnsupportedModel(
            f"{file.path}: the new network cannot be written in opset {file.opset} ({first_line(error)})"
        ) from error


class _Cast(nn.Module):
    """A network between the inputs and outputs of a file, which are in other formats than its layers."""

    def __init__(self, network: nn.Module, file: OnnxFile) -> None:
        super().__init__()
        self.network, self.dtype, self.formats = network, file.dtype, [entry.dtype for entry in file.outputs]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        found = named_outputs(self.network(*(x.to(self.dtype) for x in inputs))).values()
        return [x if x.dtype == to else x.to(to) for x, to in zip(found, self.formats, strict=True)]


def _rename(proto: onnx.ModelProto, weights: Weights, file: OnnxFile) -> Weights:
    """The names of the file's inputs and outputs; whatever else has one of them gets another. Returns the weights by their new names."""
    wanted = {f"i{i}": entry.name for i, entry in enumerate(file.inputs)}
    wanted |= {f"o{i}": entry.name for i, entry in enumerate(file.outputs)}
    names = {*weights, *(name for node in proto.graph.node for name in (*node.input, *node.output))}
    for name in (names & set(wanted.values())) - wanted.keys():
        wanted[name] = free_name(f"{name}_inner", names)
    for node in proto.graph.node:
        node.input[:] = [wanted.get(name, name) for name in node.input]
        node.output[:] = [wanted.get(name, name) for name in node.output]
    return {wanted.get(name, name): value for name, value in weights.items()}


def _tell(proto: onnx.ModelProto, source: onnx.ModelProto) -> None:
    """What the file says of itself besides its nodes and weights."""
    weights = {tensor.name for tensor in source.graph.initializer}
    outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in proto.graph.output]
    for name in ("input", "output", "value_info"):
        proto.graph.ClearField(name)
    proto.graph.input.extend(value for value in source.graph.input if value.name not in weights)
    for theirs, ours in zip(source.graph.output, outputs, strict=True):
        ours.name = theirs.name
        proto.graph.output.append(theirs if theirs.type.tensor_type.HasField("shape") else ours)
    proto.graph.name, proto.graph.doc_string = source.graph.name or "graph", source.graph.doc_string
    proto.metadata_props.extend(source.metadata_props)
    for field in ("doc_string", "domain", "model_version"):
        setattr(proto, field, getattr(source, field))
    proto.ir_version = max(4, source.ir_version)  # the first in which weights are no inputs
    proto.producer_name, proto.producer_version = "rmprune", ""


def _write(proto: onnx.ModelProto, weights: Weights, path: Path) -> OnnxFile:
    write_proto(proto, weights, path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise UnsupportedModel(f"the new network cannot be written as the file was ({first_line(error)})") from error
    return open_onnx(path)


def _compare(network: OnnxNetwork, new: OnnxFile, seed: int) -> float:
    """Both files on the examples' sizes, and, with another seed, three images where their number is open."""
    inputs = batch_for(network.file, network.examples, seed)
    if seed and all(entry.sizes[0] is None for entry in network.file.inputs):
        inputs = tuple(torch.cat([x, x.flip(0)[:1] * 3]) for x in inputs)
    return _compare_on(inputs, network, new)


def _compare_on(
    inputs: tuple[Tensor, ...], network: OnnxNetwork, new: OnnxFile, expected: list[Tensor] | None = None
) -> float:
    """The largest difference in ONNX Runtime; beside float32 also of what is read of the new file, with every result in its format.

    `expected`: what the file that was read gives, where that is known."""
    what = f"{new.path.name}, the new file,"
    model = in_format(network.model, network.file.runnable.dtype)
    own = as_tensors(inputs, network.file.runnable.dtype)
    expected = run_file(network.file.runnable, own) if expected is None else expected
    error = refuse_difference(model, own, run_file(new.runnable, own), expected, what)
    if network.file.dtype != torch.float32:
        found = outputs_of(read_network(new, like=inputs).model, inputs)
        again = refuse_difference(network.model, inputs, found, outputs_of(network.model, inputs), what)
        error = max(error, again)
    return error


def _agree_on_other_sizes(network: OnnxNetwork, new: OnnxFile) -> bool:
    """Whether the new file gives what the other does for images of other sizes where these are open, of which that takes one at least.

    A size that it does not take, or for which its outputs are not finite, says nothing.
    """
    pixels, channels = _open_axes(network)
    alone = [*_by_themselves(pixels), channels]
    tried = [(pixels, other) for other in _OTHER_SIZES] + [(axes, o) for axes in alone for o in _OTHER_SIZES[:_ALONE]]
    taken = not pixels
    for axes, other in tried:
        if not axes:
            continue
        inputs = _of_other_sizes(network, axes, other)
        try:
            expected = run_file(network.file.runnable, as_tensors(inputs, network.file.runnable.dtype))
        except (RmpruneError, RuntimeError):
            continue
        if not all(bool(x.isfinite().all()) for x in expected):
            continue
        taken = True
        try:
            _compare_on(inputs, network, new, expected)
        except (RmpruneError, RuntimeError):
            return False
    return taken


def _open_axes(network: OnnxNetwork) -> tuple[_Axes, _Axes]:
    """The axes whose sizes the file leaves open, beside that of the images' number: those of pixels, and those of channels."""
    inputs = network.file.inputs
    found = {(i, axis) for i, entry in enumerate(inputs) for axis, n in enumerate(entry.sizes) if axis and n is None}
    channels = {(i, axis) for i, axis in found if axis == channel_axis(network.file, inputs[i])}
    return found - channels, channels


def _by_themselves(pixels: _Axes) -> list[_Axes]:
    """Each axis of one input, and of several inputs the same axis of all: they may have to agree."""
    each = [{one} for one in sorted(pixels)]
    return each + [
        same for at in sorted({axis for _, axis in pixels}) if len(same := {x for x in pixels if x[1] == at}) > 1
    ]


def _of_other_sizes(network: OnnxNetwork, axes: _Axes, other: Callable[[int, int], int]) -> tuple[Tensor, ...]:
    """Noise of the examples' sizes, and of other ones at these axes."""
    inputs, generator = [], torch.Generator().manual_seed(2)
    for number, x in enumerate(network.examples):
        count = fixed_batch(network.file) or len(x)
        sizes = [other(n, i % 2) if (number, i) in axes else n for i, n in enumerate(x.shape)]
        inputs.append(torch.randn([count, *sizes[1:]], generator=generator).to(x.dtype))
    return tuple(inputs)


def _fix_sizes(proto: onnx.ModelProto, network: OnnxNetwork) -> None:
    """The sizes of the examples stand in the new file in place of those that were open; the number of images stays as it was."""
    for value, x in zip(proto.graph.input, network.examples, strict=True):
        for axis, dim in list(enumerate(value.type.tensor_type.shape.dim))[1:]:
            dim.dim_value = x.shape[axis]
    for value in proto.graph.output:
        for dim in value.type.tensor_type.shape.dim[1:]:
            dim.ClearField("value")
