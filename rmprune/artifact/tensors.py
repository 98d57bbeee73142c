"""Files of tensors, read without running what they say: .safetensors, and what torch.save wrote. Sizes are checked before memory is taken.

torch.load(weights_only=True) has the closed list of what a pickle may name, but it inflates what is compressed and believes the
sizes it is told; so a dry run of the pickle compares them with the file first. Whose tensors they are is others' business.
"""

import argparse
import io
import math
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rmprune.errors import first_line
from rmprune.runs.reading import check_regular

LARGEST_HEADER = 2**24  # bytes that name the tensors of a .safetensors file, 100 or so for each
LARGEST_PICKLE = 2**23  # bytes of a pickle without its tensors, 200 or so for each
MOST_STEPS = 2**21  # of an unpickler, 40 or so for each
_LEGACY = 0x1950A86A20F9469CFC6C  # how torch.save began its files before 1.6
_ITEM_BYTES = {
    **dict.fromkeys(("Untyped", "Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}


def read_tensors(path: Path) -> Any:
    """What a file of weights holds, of whichever kind it is: its first bytes say so, not its name. Raises as the two below."""
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(9)
    named = path.suffix.lower() == ".safetensors" and start[:1] not in (b"P", b"\x80")
    return (read_safetensors if start[8:] == b"{" or named else read_pickled)(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises OSError where it cannot be read, ValueError where it is damaged."""
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) == 8 and struct.unpack("<Q", start)[0] > LARGEST_HEADER:
        raise ValueError(f"its header would be longer than {LARGEST_HEADER} bytes")
    try:
        return dict(load_file(path))
    except (SafetensorError, KeyError, RuntimeError, MemoryError) as error:
        raise ValueError(first_line(error)) from error


def read_pickled(path: Path) -> Any:
    """Tensors and plain values of a file that torch.save wrote, on the CPU.

    Raises OSError where it cannot be read, pickle.UnpicklingError where it needs code, ValueError where it is damaged or promises
    more than it holds.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\3\4"  # as torch tells them apart
        (_check_archive if is_archive else _check_legacy)(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch to itself
            # argparse's are timm's and torchvision's notes: values alone; opened here, as torch reads a .safetensors by its name
            with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:  # torch's own words advise to run it
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it needs {needed[1]}, which is code" if needed else first_line(error)
        raise pickle.UnpicklingError(reason) from None
    except Exception as error:  # zip readers and unpicklers stumble in many ways over damaged bytes
        raise ValueError(first_line(error)) from error


def is_plain(value: Any) -> bool:
    """Whether this is a tensor whose values all lie in memory: not sparse, quantised, expanded or without data."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _check_archive(path: Path) -> None:
    """Raise ValueError unless this zip archive is as torch.save writes it: nothing compressed, every storage as long as promised."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        sizes = {entry.filename.lower(): entry.file_size for entry in entries}
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise pickle.UnpicklingError("it is TorchScript, which is code")
        if len(sizes) < len(entries) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("parts of it are compressed or stand twice, which torch.save never writes")
        if sum(sizes.values()) > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
        for entry in entries:
            if entry.CRC:  # torch never looks at it, and can be told to write none
                with archive.open(entry) as part:
                    while part.read(2**20):
                        pass
        content = next((entry for entry in entries if entry.filename.endswith("/data.pkl")), None)
        if content is None:
            raise ValueError("a zip archive that torch.save did not write")
        if content.file_size > LARGEST_PICKLE:
            raise ValueError(f"its pickle is longer than {LARGEST_PICKLE} bytes")
        with path.open("rb") as file:  # not through zipfile, which insists on a checksum
            file.seek(content.header_offset + 26)
            file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)
            promised = _promised(io.BytesIO(file.read(content.file_size)))
    root = content.filename.removesuffix("data.pkl")
    for key, size in promised.items():
        if sizes.get(f"{root}data/{key}".lower()) != size:
            raise ValueError(f"storage {key[:80]} should have {size} bytes and has not")


def _check_legacy(path: Path) -> None:
    """Raise ValueError unless this file begins as torch.save wrote them before 1.6 and holds as much as it promises."""
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(LARGEST_PICKLE))
    if _DryRun(stream).load() != _LEGACY:
        raise ValueError("not a file of torch.save")
    for _ in ("protocol", "system"):
        _DryRun(stream).load()
    if sum(_promised(stream).values()) > path.stat().st_size:
        raise ValueError("its tensors are larger than the file")


def _promised(stream: io.BytesIO) -> dict[str, int]:
    """Key -> bytes, of each storage that a pickle refers to."""
    dry = _DryRun(stream)
    dry.load()
    return dry.storages


class _Storage(NamedTuple):
    items: int


class _Nothing:
    """Stands in a dry run where the pickle makes an object."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> "_Nothing":
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _Costly(_Nothing):
    """Stands for what takes memory by the number that it is called with."""

    def __init__(self, *args: Any) -> None:
        raise ValueError("it makes a tensor or a buffer of any size it likes")


class _Counted(dict[int, Any]):
    """Steps of an unpickler, of which a file may ask for only so many: each takes time and memory."""

    steps = 0

    def __getitem__(self, code: int) -> Any:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise ValueError(f"its pickle has more than {MOST_STEPS} steps")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError("its pickle is of another kind than torch.save's")


class _DryRun(pickle._Unpickler):  # the one in C takes memory for whatever number stands in a memo
    """Goes through a pickle (protocol 2, as torch writes it), makes nothing of it, and remembers the storages it asks for."""

    dispatch: ClassVar[dict[int, Any]] = {
        ord(code.code): pickle._Unpickler.dispatch[ord(code.code)] for code in pickletools.opcodes if code.proto <= 2
    }

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, int] = {}
        self.dispatch = _Counted(self.dispatch)  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> Any:
        kind = name.removesuffix("Storage")
        if module in ("torch", "torch.cuda", "torch.storage") and kind != name and kind in _ITEM_BYTES:
            return _ITEM_BYTES[kind]
        if module == "torch._utils" and name.startswith(("_rebuild_tensor", "_rebuild_qtensor")):
            return _check_tensor
        return _Costly if name == "bytearray" or name.endswith("Tensor") else _Nothing

    def persistent_load(self, pid: Any) -> _Storage:
        if pid[0] == "module":
            raise pickle.UnpicklingError("it holds a whole module, which is code")
        tag, item_bytes, key, _, items = pid[:5]
        if tag != "storage" or not isinstance(key, str) or not all(isinstance(n, int) for n in (item_bytes, items)):
            raise ValueError("it refers to something that is no storage")
        if self.storages.setdefault(key, item_bytes * items) != item_bytes * items:
            raise ValueError(f"storage {key[:80]} has two sizes")
        return _Storage(items)


def _check_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Nothing:
    """Raise ValueError where a tensor would reach beyond its storage (torch would make the storage longer)."""
    end = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides), default=0) < 0 or (math.prod(shape) and end > storage.items):
        raise ValueError("a tensor reaches beyond its storage")
    return _Nothing()
