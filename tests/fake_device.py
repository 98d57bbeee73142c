"""A GPU that is not there: tensors with values that say they lie on `cuda:0`, on a machine without one.

Values are computed on the CPU, so results can be compared with the CPU's; what is pretended is the place. Each storage has one. Under
`pretended_gpu` an operation of tensors from different places fails as it would on a GPU, and what would make the processor wait for the
GPU, or copy between them, is noted with the line of ours that did it. Graphs are recorded and replayed operation by operation.

What multiplies float32 while TF32 is allowed, as convolutions are unless a program says otherwise, is noted too.

Stock torch code that asks where a tensor is, from within an operation, is told `cpu`: only ours is looked at.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
PACKAGE = str(Path(__file__).parents[1] / "rmprune")
WAITS = {  # their results' sizes or values are needed by the processor
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
    *("equal", "is_nonzero", "_linalg_check_errors", "repeat_interleave"),
}

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")
ROUNDED: dict[str, Callable[[], bool]] = {
    "convolution": lambda: torch.backends.cudnn.allow_tf32,
    **dict.fromkeys(PRODUCTS, lambda: torch.backends.cuda.matmul.allow_tf32),
}
"""Whether a GPU may round the factors now, by the name of the operation."""

STOCK = ("torch/nn/utils/clip_grad.py", "torch/utils/_foreach_utils.py")


class Places:
    """Which storages lie on the GPU; and `noted`: (what, line of the package) of every wait and every copy between places; `rounded`: the
    lines that had float32 factors rounded to TF32's."""

    def __init__(self) -> None:
        self.on_gpu: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again
        self.noted: list[tuple[str, str]] = []
        self.rounded: list[str] = []

    def of(self, tensor: Tensor) -> torch.device:
        """Where a tensor is."""
        return GPU if tensor.device == CPU and tensor.untyped_storage()._cdata in self.on_gpu else tensor.device

    def put(self, found: Any, device: torch.device) -> None:
        """Say that all tensors of a result lie there."""
        for tensor in tensors(found):
            if tensor.device == CPU:
                storage = tensor.untyped_storage()
                self.on_gpu.pop(storage._cdata, None)
                if device.type == "cuda":
                    self.on_gpu[storage._cdata] = StorageWeakRef(storage)

    def note(self, what: str) -> None:
        """Add a wait or a copy, with the line that asked for it."""
        self.noted.append((what, innermost()))


def innermost() -> str:
    """The line of the package that is at work."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Operations(TorchDispatchMode):
    """Checks the places of every operation, those of backward passes too."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given, name = tensors((args, kwargs)), func._schema.name.removeprefix("aten::")
        there = [t for t in given if self.places.of(t) == GPU]
        here = [t for t in given if self.places.of(t) == CPU]
        device = GPU if there else CPU
        if there and here:
            device = self.mixed(name, args, here)
        if there and (name in WAITS or (name.startswith("index") and any(t.dtype == torch.bool for t in there))):
            self.places.note(f"wait: {name}")
        allowed = ROUNDED.get(name.removesuffix("_backward"))
        if there and allowed is not None and allowed() and all(t.dtype == torch.float32 for t in there):
            self.places.rounded.append(innermost())
        result = func(*args, **kwargs)
        own = {t.untyped_storage()._cdata for t in given}
        self.places.put([t for t in tensors(result) if t.untyped_storage()._cdata not in own], device)
        return result

    def mixed(self, name: str, args: tuple[Any, ...], here: list[Tensor]) -> torch.device:
        """Where the result lies of an operation with arguments from both places; RuntimeError where a GPU refuses it."""
        if name == "copy_" or (name.startswith("index") and self.places.of(args[0]) == GPU):
            self.places.note(f"copy: {name}")
            return self.places.of(args[0])
        if name == "_has_compatible_shallow_copy_type":  # asked by Module.to, of a parameter and its copy
            return CPU
        if all(t.dim() == 0 for t in here) and name not in ("cat", "stack"):
            return GPU
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
        )


class Calls(TorchFunctionMode):
    """Answers where tensors are, and makes and moves them."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        getter = getattr(func, "__self__", None)
        if getter is Tensor.device:
            return self.places.of(args[0])
        if getter in (Tensor.is_cuda, Tensor.is_cpu):
            return (self.places.of(args[0]) == GPU) == (getter is Tensor.is_cuda)
        if func is Tensor.__deepcopy__:
            known = len(self.places.noted)
            result = func(*args, **kwargs)
            del self.places.noted[known:]  # it copies storages, which stay where they are
            self.places.put(result, self.places.of(args[0]))
            return result
        if func in (Tensor.numpy, Tensor.__array__) and self.places.of(args[0]) == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func is Tensor.tolist and self.places.of(args[0]) == GPU:
            self.places.note("wait: tolist")
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self.moved(func, args, kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "meta":
            return self.made(func, name, args, kwargs)
        return func(*args, **kwargs)

    def made(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = torch.device(kwargs.pop("device"))
        generator = kwargs.get("generator")
        if device.type == "cuda" and generator is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if device.type == "cuda" and name in ("tensor", "as_tensor"):
            self.places.note(f"copy: {name}")
        result = func(*args, **kwargs, device=CPU)
        self.places.put(result, device)
        return result

    def moved(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor, *rest = args
        copied = kwargs.pop("copy", False)
        if func is Tensor.to and rest and isinstance(rest[0], Tensor):
            device, dtype, order = self.places.of(rest[0]), rest[0].dtype, None
        elif func is Tensor.to:
            device, dtype, _, order = torch._C._nn._parse_to(*rest, **kwargs)
        else:
            device, dtype, order = (CPU if func is Tensor.cpu else GPU), None, kwargs.get("memory_format")
        source = self.places.of(tensor)
        told = sys._getframe(2).f_code.co_filename.endswith(
            STOCK
        )  # that it is on the CPU, by code that is not in Python
        device = source if device is None or told else GPU if device.type == "cuda" else device
        away = source != device
        if away and device.type != "meta":
            self.places.note(f"copy: to {device.type}")
        result: Tensor = tensor.to(
            "meta" if device.type == "meta" else CPU,
            dtype or tensor.dtype,
            copy=copied or away,
            memory_format=order or torch.preserve_format,
        )
        if away:
            self.places.put(result, device)
        return result


class Stream:
    """All of them do their work at once."""

    cuda_stream = 0

    def wait_stream(self, other: "Stream") -> None:
        pass


class Event:
    """When the processor was there: all work is done by then."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


CURRENT = [Stream()]


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    before, CURRENT[0] = CURRENT[0], stream
    try:
        yield
    finally:
        CURRENT[0] = before


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Places]:
    """Within it there is one GPU, without bfloat16."""
    places = Places()
    with pytest.MonkeyPatch.context() as patch, Operations(places), Calls(places):
        for name, value in {
            "device_count": lambda: 1,
            "is_available": lambda: True,
            "is_bf16_supported": lambda: False,
            "get_rng_state": lambda device=0: torch.get_rng_state(),
            "set_rng_state": lambda state, device=0: None,
            "synchronize": lambda device=None: None,
            "get_device_name": lambda device=None: "a pretended GPU",
            "mem_get_info": lambda device=None: (2**30, 2**30),
            "reset_peak_memory_stats": lambda device=None: None,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 2**20,
            "empty_cache": lambda: None,
            "device": lambda device: contextlib.nullcontext(),
            "Event": Event,
            "Stream": Stream,
            "current_stream": lambda: CURRENT[0],
            "stream": on_stream,
            "CUDAGraph": Graph,
            "graph": recording,
        }.items():
            patch.setattr(torch.cuda, name, value)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # asks a real one
            patch.setattr(torch.optim.Optimizer, name, lambda optimizer: None, raising=False)
        patch.setattr(torch.onnx, "export", outside(torch.onnx.export))
        yield places


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, which looks at no operation: what torch.jit traces under a mode is another network."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


class Graph:
    """What was recorded: (operation, arguments, results) in order."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        """Every operation again on the same tensors, its results into those of the recording."""
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                for old, new in zip(tensors(results), tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        old.copy_(new)


@contextlib.contextmanager
def recording(graph: Graph, stream: object, capture_error_mode: str) -> Iterator[None]:
    """A GPU does not compute what it records: what operations change in place is put back, and the random state.

    As torch's own it leaves `stream` the current one where what is recorded fails.
    """
    assert capture_error_mode == "thread_local"
    before, CURRENT[0] = CURRENT[0], stream
    saved: dict[int, tuple[Tensor, Tensor]] = {}
    state = torch.get_rng_state()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if func._schema.name.removeprefix("aten::") in WAITS:
                raise RuntimeError(f"operation not permitted when stream is capturing ({func})")
            for value, argument in zip(args, func._schema.arguments, strict=False):
                changed = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tensors(value) if changed else ():
                    saved.setdefault(tensor.untyped_storage()._cdata, (tensor, tensor.clone()))
            if func._schema.name == "aten::native_batch_norm":  # changes its statistics, and its schema does not say so
                for tensor in tensors(args[3:5]):
                    saved.setdefault(tensor.untyped_storage()._cdata, (tensor, tensor.clone()))
            result = func(*args, **kwargs)
            graph.operations.append((func, args, kwargs, result))
            return result

    with Recorder():
        yield
    CURRENT[0] = before
    with torch.no_grad():
        for tensor, before in saved.values():
            tensor.copy_(before)
    torch.set_rng_state(state)
