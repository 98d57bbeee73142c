"""TensorRT that is not there: the calls of its Python bindings 10 and 11 that `rmprune.measure.runtimes` makes, computed by ONNX Runtime.

It is strict where TensorRT is: nothing runs before every tensor has an address, a free batch size needs a profile, and what a stream is
given is read and written at the addresses when it runs, so that a recorded run computes anew each time.
"""

import ctypes
from enum import IntEnum
from math import prod
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

__version__ = "a stand-in"
SESSIONS: list[Any] = []
float32 = np.float32


class Logger:
    ERROR = 1

    def __init__(self, min_severity: int) -> None: ...


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1  # 0 in TensorRT 11


class BuilderFlag(IntEnum):
    TF32 = 7


class Network:
    """As an ONNX parser fills it."""

    content: bytes

    def get_input(self, index: int) -> Any:
        return self.inputs()[index]

    def inputs(self) -> list[Any]:
        return [Entry(value) for value in onnx.load_from_string(self.content).graph.input]


class Entry:
    def __init__(self, value: Any) -> None:
        self.name = value.name
        self.shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim)


class OnnxParser:
    def __init__(self, network: Network, logger: Logger) -> None:
        self.network = network

    def parse(self, model: bytes) -> bool:
        self.network.content = model
        return True

    def get_error(self, index: int) -> str:
        raise IndexError("there is none")


class Profile:
    shapes: dict[str, tuple[int, ...]]

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        assert min == opt == max
        self.shapes = {input: opt}


class Config:
    def __init__(self) -> None:
        self.flags, self.profiles = {BuilderFlag.TF32}, list[Profile]()

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Builder:
    def __init__(self, logger: Logger) -> None: ...

    def create_network(self, flags: int = 0) -> Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> tuple[bytes, dict[str, tuple[int, ...]]]:
        assert not config.flags and -1 in network.get_input(0).shape
        return network.content, config.profiles[0].shapes


class Runtime:
    def __init__(self, logger: Logger) -> None: ...

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "Engine":
        return Engine(*serialized_engine)


class Engine:
    def __init__(self, content: bytes, shapes: dict[str, tuple[int, ...]]) -> None:
        self.session, self.shapes = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]), shapes
        self.names = [entry.name for entry in (*self.session.get_inputs(), *self.session.get_outputs())]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return float32

    def create_execution_context(self) -> "Context":
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.shapes = engine, dict[str, tuple[int, ...]]()
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.engine.shapes[name] == shape
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            (entry,) = self.engine.session.get_inputs()
            found = self.engine.session.run([name], {entry.name: np.zeros(self.shapes[entry.name], np.float32)})
            self.shapes[name] = found[0].shape
        return self.shapes[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert isinstance(stream_handle, int) and self.addresses.keys() == set(self.engine.names)
        x, y = (self.at(name) for name in self.engine.names)
        SESSIONS.append(self.engine.session)
        enqueue(x, y, len(SESSIONS) - 1)
        return True

    def at(self, name: str) -> Tensor:
        """The float32 values that lie at the address."""
        shape = self.get_tensor_shape(name)
        values = (ctypes.c_float * prod(shape)).from_address(self.addresses[name])
        return torch.frombuffer(values, dtype=torch.float32).view(shape)


@torch.library.custom_op("fake_tensorrt::enqueue", mutates_args=("y",))
def enqueue(x: Tensor, y: Tensor, session: int) -> None:
    """One operation, so that a pretended CUDA graph records it."""
    own = SESSIONS[session]
    y.copy_(torch.from_numpy(own.run(None, {own.get_inputs()[0].name: x.numpy()})[0]))


def nptype(dtype: Any) -> Any:
    return dtype
