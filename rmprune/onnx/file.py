"""An ONNX file from outside: parsed, and looked at before anything is allocated or run. `read` makes networks of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from rmprune.errors import ArtifactError, UnsupportedModel, first_line
from rmprune.graph.vocabulary import MAX_ENTRIES
from rmprune.onnx.compare import open_session
from rmprune.onnx.formats import NUMBER_FORMATS, all_float32, format_of
from rmprune.onnx.order import check_names, drop_unread, printable, said_of, sort_nodes
from rmprune.onnx.tensors import ASKED, MOST_AXES, check_tensor, every_tensor, type_name, values_of
from rmprune.runs.reading import not_data

OPSETS = range(7, onnx.defs.onnx_opset_version() + 1)
CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")


@dataclass(frozen=True)
class OnnxInput:
    """An input or output of a file: its name, its sizes, None where a size is left open, and float32, float16 or float64."""

    name: str
    sizes: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class OnnxFile:
    """A file that was looked at: its path, what it says, the opset of its operators, its inputs without weights, and its outputs.

    dtype: what its layers compute in, float32, float16 or float64. in_memory: `proto` is not what stands in the file.
    """

    path: Path
    proto: onnx.ModelProto
    opset: int
    inputs: tuple[OnnxInput, ...]
    outputs: tuple[OnnxInput, ...]
    dtype: torch.dtype = torch.float32
    in_memory: bool = False

    @cached_property
    def in_float32(self) -> OnnxFile:
        """The same graph with all weights and results in float32: itself where it computes so already. Raises UnsupportedModel for weights
        of over 2 GiB."""
        if {self.dtype, *(entry.dtype for entry in (*self.inputs, *self.outputs))} == {torch.float32}:
            return self
        proto = onnx.ModelProto.FromString(self.proto.SerializeToString())
        for _, tensor in every_tensor(proto.graph):
            if tensor.data_type in NUMBER_FORMATS or tensor.data_location == tensor.EXTERNAL:
                value = self.array(tensor).astype(np.float32 if tensor.data_type in NUMBER_FORMATS else None)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        all_float32(proto.graph)
        if proto.ByteSize() >= 2**31:
            raise UnsupportedModel(
                f"{self.path}: in float32, in which it is compared, its weights take over 2 GiB; {ASKED.replace(' or float16', '')}"
            )
        sides = ([replace(entry, dtype=torch.float32) for entry in side] for side in (self.inputs, self.outputs))
        inputs, outputs = map(tuple, sides)
        return OnnxFile(self.path, proto, self.opset, inputs, outputs, in_memory=True)

    @property
    def runnable(self) -> OnnxFile:
        """What ONNX Runtime's CPU can run: the file itself, in float32 where it computes in double (it has no such convolution)."""
        return self.in_float32 if self.dtype == torch.float64 else self

    @property
    def session(self) -> Any:
        """The file in ONNX Runtime; kept, except where weights lie beside the file: they would be in memory twice."""
        beside = any(tensor.data_location == tensor.EXTERNAL for tensor in self.proto.graph.initializer)
        return open_session(self.path) if beside else self._kept_session

    @cached_property
    def _kept_session(self) -> Any:
        return open_session(self.proto.SerializeToString() if self.in_memory else self.path)

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """In the order of the file, which is one that they can be run in."""
        return list(self.proto.graph.node)

    def array(self, tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
        """The values of a tensor; external ones are mapped from their file, and not read before they are used. Raises ArtifactError where
        they cannot be read."""
        try:
            return values_of(tensor, self.path)
        except (ValueError, OverflowError, OSError) as error:
            raise ArtifactError(
                f"{self.path}: tensor {printable(tensor.name)}: {first_line(error)}; export the file again"
            ) from None


def is_onnx(path: str | Path) -> bool:
    """Whether this names an ONNX file: by its ending."""
    return str(path).lower().endswith(".onnx")


def open_onnx(path: str | Path) -> OnnxFile:
    """Parses an ONNX file and checks all that it says of itself: nothing is executed, and no tensor read.

    Raises ArtifactError for what is missing, damaged or contradicts itself, and UnsupportedModel for what another program would have
    to run (operators of other domains, functions, control flow) or rmprune does not take (opset, types); each names file and place.
    """
    path = Path(path)
    proto = _parse(path)
    try:
        opset = _opset(proto)
        if len(proto.graph.node) + len(proto.graph.initializer) > MAX_ENTRIES:
            raise ArtifactError(f"more than {MAX_ENTRIES} nodes and tensors; split the network")
        weights = {tensor.name for tensor in proto.graph.initializer}
        sort_nodes(proto.graph)
        drop_unread(proto.graph, weights)
        _refuse_foreign_nodes(proto)
        for where, tensor in every_tensor(proto.graph):
            check_tensor(where, tensor, path)
        check_names(proto.graph)
        inputs = tuple(_described(value, "input") for value in proto.graph.input if value.name not in weights)
        outputs = tuple(_described(value, "output") for value in proto.graph.output)
        for value, count in Counter(value.name for value in proto.graph.output).items():
            if count > 1:  # taken by ONNX Runtime, but not by onnx's checker
                raise ArtifactError(f"its output {printable(value)} stands {count} times among the outputs; leave one")
        if not inputs or not outputs:
            raise ArtifactError(f"the graph has no {'inputs' if not inputs else 'outputs'}; export the network again")
        dtype = format_of(proto.graph)
    except (ArtifactError, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error}") from None
    return OnnxFile(path, proto, opset, inputs, outputs, dtype)


def _parse(path: Path) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would never end
            raise ArtifactError(f"{path}: not a regular file")
        if path.stat().st_size >= 2**31:
            raise ArtifactError(
                f"{path}: over 2 GiB, which no ONNX file can be; store its weights as external data (onnx.save_model)"
            )
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}); name an ONNX file") from error
    except (DecodeError, ValueError, RuntimeError) as error:
        told = not_data(path) or f"{first_line(error)}; copy or export it again"
        raise ArtifactError(f"{path}: damaged, or no ONNX file: {told}") from None
    if not proto.HasField("graph") or not proto.graph.node:
        raise ArtifactError(f"{path}: holds no network; it was cut short or is no ONNX file: copy or export it again")
    if not _is_text(proto):
        raise ArtifactError(f"{path}: damaged: a name in it is no text (UTF-8); copy or export it again")
    return proto


def _is_text(message: Any) -> bool:
    """Whether every string of a message is one: protobuf hands those that are not UTF-8 on as bytes."""
    for field, value in message.ListFields():
        values = [value] if isinstance(value, str | bytes) or not hasattr(value, "__len__") else value
        if field.type == field.TYPE_MESSAGE and not all(map(_is_text, values)):
            return False
        if field.type == field.TYPE_STRING and any(isinstance(one, bytes) for one in values):
            return False
    return True


def _opset(proto: onnx.ModelProto) -> int:
    own = sorted({entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")})
    if not own:
        raise ArtifactError(
            "it names no opset, so what its operators mean is not known; export it again, or add its opset_import"
        )
    if len(own) != 1 or own[0] not in OPSETS:
        said = ", ".join(map(str, own))
        raise UnsupportedModel(
            f"its opset is {said}, read are {OPSETS.start} to {OPSETS.stop - 1}; convert it by onnx.version_converter, or export it again"
        )
    return own[0]


def _refuse_foreign_nodes(proto: onnx.ModelProto) -> None:
    if proto.functions:
        raise UnsupportedModel(
            f"it defines functions of its own ({printable(proto.functions[0].name)}); inline them (onnx.inliner.inline_local_functions)"
        )
    for node in proto.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedModel(
                f"{said_of(node)}: an operator of {printable(node.domain)}, which is not ONNX's own; export the network without it"
            )
        if node.op_type in CONTROL_FLOW:
            raise UnsupportedModel(
                f"{said_of(node)}: control flow cannot be read as layers; export the network for one case, without branches and loops"
            )


def _described(value: onnx.ValueInfoProto, what: str) -> OnnxInput:
    kind = value.type.WhichOneof("value") or "no type"
    tensor = value.type.tensor_type
    if kind != "tensor_type" or tensor.elem_type not in NUMBER_FORMATS:
        said = type_name(tensor.elem_type) if kind == "tensor_type" else kind.removesuffix("_type")
        todo = ASKED if said == "bfloat16" else "cut the file where it is (onnx.utils.extract_model)"
        raise UnsupportedModel(
            f"its {what} {printable(value.name)} is {said}; taken are tensors of float32, float16 and double: {todo}"
        )
    sizes = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
    if what == "input" and (not sizes or len(sizes) > MOST_AXES):
        raise UnsupportedModel(
            f"its {what} {printable(value.name)} has {len(sizes)} axes; taken are batches, (N, ...): export it with its sizes"
        )
    if what == "input" and any(dim.HasField("dim_value") and dim.dim_value == 0 for dim in tensor.shape.dim):
        raise UnsupportedModel(
            f"its {what} {printable(value.name)} has an axis of size 0, so that it takes nothing; export it with its sizes, or open"
        )
    return OnnxInput(value.name, sizes, NUMBER_FORMATS[tensor.elem_type])
