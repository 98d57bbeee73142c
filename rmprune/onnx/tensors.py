"""The tensors of an ONNX file: whether type, sizes and bytes belong together, inside and beside it, and their values. It runs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from rmprune.errors import ArtifactError, UnsupportedModel, first_line
from rmprune.onnx.order import printable, said_of

_TYPES = ("float32", "float64", "float16", "int64", "int32", "bool", "int8", "uint8")
_DTYPES = {int(helper.np_dtype_to_tensor_dtype(np.dtype(name))): np.dtype(name) for name in _TYPES}
MOST_AXES = 8
ASKED = "export it in float32 or float16"


def every_tensor(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every tensor of a graph without control flow, with where it stands. Raises UnsupportedModel for sparse ones and attributes of no
    plain value."""
    if graph.sparse_initializer:
        raise UnsupportedModel("it holds sparse tensors; export it with dense ones")
    for tensor in graph.initializer:
        yield f"tensor {printable(tensor.name)}", tensor
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.ref_attr_name or attribute.graphs or attribute.tensors or attribute.HasField("g"):
                raise UnsupportedModel(
                    f"{said_of(node)}: its {printable(attribute.name)} is no plain value; export it again"
                )
            if attribute.HasField("t"):
                yield f"{said_of(node)}, {printable(attribute.name)}", attribute.t


def check_tensor(where: str, tensor: onnx.TensorProto, path: Path) -> None:
    """Raise where type, sizes and bytes of a tensor do not belong together, or where its bytes lie somewhere else than they may."""
    if tensor.data_type not in _DTYPES:
        raise UnsupportedModel(f"{where} is {type_name(tensor.data_type)}; read are {', '.join(_TYPES)}: {ASKED}")
    if len(tensor.dims) > MOST_AXES or any(not 0 <= size < 2**40 for size in tensor.dims):
        raise ArtifactError(f"{where} has sizes {list(tensor.dims)[:MOST_AXES]}; export the network again")
    count = math.prod(tensor.dims)
    wanted = count * _DTYPES[tensor.data_type].itemsize
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _external(where, tensor, path, wanted)
        return
    found = len(tensor.raw_data) if tensor.HasField("raw_data") else len(_listed(tensor))
    if found != (wanted if tensor.HasField("raw_data") else count):
        raise ArtifactError(
            f"{where} of sizes {list(tensor.dims)} holds another number of values; copy or export the file again"
        )


def type_name(kind: int) -> str:
    """A type of tensors by name, or by number where onnx knows none."""
    known = onnx.TensorProto.DataType
    return known.Name(kind).lower() if kind in known.values() else str(kind)


def _listed(tensor: onnx.TensorProto) -> Any:
    return getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type))


def _external(where: str, tensor: onnx.TensorProto, path: Path, wanted: int) -> tuple[Path, int]:
    """The file and offset of external data, which lie in the ONNX file's folder and hold what they should."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.resolve().parent
    try:
        outside = Path(location).is_absolute() or ".." in Path(location.replace("\\", "/")).parts or not location
        file = (folder / location).resolve()
        if outside or not file.is_relative_to(folder):
            raise ArtifactError(
                f"{where}: its data would lie in {printable(location)}, outside of the file's own folder; put it there and name it plainly"
            )
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or wanted)
        size = file.stat().st_size if file.is_file() else -1
    except (ValueError, OSError, RuntimeError) as error:  # of a circle of links
        raise ArtifactError(
            f"{where}: its external data {printable(location)}: {first_line(error)}; copy it again"
        ) from None
    if size < 0:
        raise ArtifactError(f"{where}: its data {printable(location)} is missing; copy it beside the ONNX file")
    if offset < 0 or length != wanted or offset + length > size:
        raise ArtifactError(
            f"{where}: {printable(location)} is shorter than the tensor, or was cut short; copy it again"
        )
    return file, offset


def values_of(tensor: onnx.TensorProto, path: Path) -> np.ndarray[Any, Any]:
    """The values of a tensor of the file at `path`; external ones are mapped, and not read before they are used."""
    dtype, shape = _DTYPES[tensor.data_type], tuple(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        file, offset = _external(printable(tensor.name), tensor, path, math.prod(shape) * dtype.itemsize)
        return np.memmap(file, dtype, "r", offset, shape) if math.prod(shape) else np.empty(shape, dtype)
    if tensor.HasField("raw_data"):
        return np.frombuffer(tensor.raw_data, dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)
    if dtype == np.float16:  # listed as the bits of each
        return np.array(_listed(tensor), np.uint16).view(dtype).reshape(shape)
    return np.array(_listed(tensor), dtype).reshape(shape)
