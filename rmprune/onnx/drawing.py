"""The graph that an ONNX file is drawn as, node by node, and what an operator's reader may ask of its node. Operators are in the tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from rmprune.graph.names import RESERVED
from rmprune.graph.network import free_name
from rmprune.graph.obstacle import Obstacle
from rmprune.graph.run import node_value
from rmprune.graph.shapes import blank, on_meta
from rmprune.onnx.constants import MOST_OF_ALL, Array

MOST_ENTRIES = 2**26  # of one map of a batch of two: 64 channels of 512 x 1024 pixels
IN_EVAL = "export the network in eval mode"
"""What there is to do about an operator as it is in training."""


class Known(NamedTuple):
    """A tensor that the file says, or that follows from sizes: its values at each of two batch sizes, equal for a constant."""

    one: Array
    other: Array

    @property
    def constant(self) -> bool:
        """Whether it is the same for every batch size."""
        return self.one is self.other or (
            self.one.shape == self.other.shape and bool(np.array_equal(self.one, self.other))
        )


OnnxValue = Known | fx.Node


class NamedSum(nn.Module):
    """An addition with a name of its own, by which its residual is called; whoever traces the network goes through it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Drawing:
    """A torch.fx graph and its layers while they are made. Every node is run at once on the meta device, for two batch sizes."""

    def __init__(self) -> None:
        self.graph, self.root = fx.Graph(), nn.Module()
        self._taken = set(RESERVED)
        self._constants: dict[int, fx.Node] = {}
        self._kept: list[Array] = []  # so that no id is used twice
        self.room = MOST_OF_ALL

    def name(self, wanted: str) -> str:
        """A free name like `wanted`, of letters, digits and _."""
        plain = re.sub(r"[^A-Za-z0-9_]+", "_", wanted)[:80].strip("_") or "layer"
        found = free_name(plain if plain[0].isalpha() else f"n{plain}", self._taken)
        self._taken.add(found)
        return found

    def input(self, wanted: str, examples: tuple[Tensor, Tensor]) -> fx.Node:
        """An input of the network, and what it is on the meta device for the two batch sizes."""
        node = self.graph.placeholder(self.name(wanted))
        node.meta["seen"] = examples
        return node

    def layer(self, wanted: str, module: nn.Module, *sources: fx.Node) -> fx.Node:
        """A layer that reads these nodes."""
        name = self.name(wanted)
        self.root.add_module(name, module.eval())
        return self._run(self.graph.call_module(name, sources), on_meta(module))

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A function, or the method of this name, of nodes and plain values."""
        kind = "call_method" if isinstance(function, str) else "call_function"
        return self._run(self.graph.create_node(kind, function, args, kwargs), None)

    def spend(self, values: int) -> None:
        """Counts so many values that take memory beside the file's own. Raises Obstacle where there are too many."""
        self.room -= values
        if self.room < 0:
            raise Obstacle("what is computed of constants up to it is too large")

    def constant(self, value: Array) -> fx.Node:
        """A tensor that the graph reads."""
        if id(value) not in self._constants:
            self.spend(value.size)
            name, tensor = self.name("constant"), tensor_of(value)
            self.root.register_buffer(name, tensor)
            self._constants[id(value)] = self._run(self.graph.get_attr(name), blank(tensor))
            self._kept.append(value)
        return self._constants[id(value)]

    def _run(self, node: fx.Node, own: Any) -> fx.Node:
        with torch.device("meta"), torch.no_grad():
            seen = [node_value(node, lambda source, k=k: source.meta["seen"][k], lambda _: own) for k in (0, 1)]  # type: ignore[misc]
        for value in seen:
            if not isinstance(value, Tensor):
                raise Obstacle("it gives no tensor")
            if value.numel() > MOST_ENTRIES or 0 in value.shape:
                raise Obstacle(f"it gives a map of sizes {list(value.shape)}; give a smaller image size")
        node.meta["seen"] = tuple(seen)
        return node


def tensor_of(value: Array) -> Tensor:
    """A copy of it that torch owns."""
    return torch.from_numpy(np.array(value, order="C"))


def shapes(node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a node gives, at the two batch sizes."""
    one, other = (tuple(seen.shape) for seen in node.meta["seen"])
    return one, other


@dataclass
class Call:
    """One node of a file as its operator's reader sees it: what it reads, and the attributes that were not asked for yet."""

    op: str
    name: str
    opset: int
    values: list[OnnxValue | None]
    attributes: dict[str, Any]
    drawing: Drawing
    outputs: int = 1
    fixed_batch: int | None = None

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute by name, which counts as read from then on."""
        value = self.attributes.pop(name, default)
        return list(value) if isinstance(value, tuple | list) else value

    def only(self, name: str, value: Any, way: str = "") -> None:
        """Raises Obstacle unless an attribute has this value, or is not there; `way`: what may be done about it."""
        found = self.attribute(name, value)
        if found != value:
            raise Obstacle(f"{name}={found!r} is not read, only {value!r}{way and f'; {way}'}")

    def given(self, place: int) -> bool:
        """Whether the input at this place is there."""
        return place < len(self.values) and self.values[place] is not None

    def source(self, place: int = 0) -> fx.Node:
        """The input at this place as a node of the graph. Raises Obstacle where it is missing or its size follows the batch."""
        value = self.values[place] if self.given(place) else None
        if value is None:
            raise Obstacle(f"its input {place + 1} is missing")
        if isinstance(value, fx.Node):
            return value
        if not value.constant:
            raise Obstacle(f"its input {place + 1} is computed from the number of images in a batch")
        return self.drawing.constant(value.one)

    def known(self, place: int, what: str) -> Array:
        """The values of a constant input. Raises Obstacle where it is missing, or computed from images or the batch."""
        value = self.values[place] if self.given(place) else None
        if not isinstance(value, Known) or not value.constant:
            raise Obstacle(
                f"its {what} is {'missing' if value is None else 'computed while it runs'}; it has to stand in the file"
            )
        return value.one

    def number(self, place: int) -> float | None:
        """The value of a constant input of one entry; None for every other."""
        value = self.values[place]
        if not isinstance(value, Known) or not value.constant or value.one.size != 1 or value.one.ndim > 1:
            return None
        return float(value.one.reshape(-1)[0])

    def shape(self, place: int = 0) -> tuple[int, ...]:
        """Of an input, at the first batch size."""
        return shapes(self.source(place))[0]

    def layer(self, module: nn.Module, source: fx.Node | None = None) -> fx.Node:
        """A layer that reads `source`, the first input as a rule."""
        return self.drawing.layer(self.name, module, self.source() if source is None else source)

    def ask(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A function in the graph."""
        return self.drawing.call(function, *args, **kwargs)


def of_rank(kinds: tuple[Any, ...], axes: int) -> Any:
    """The kind of layer for this many axes beside batch and channels."""
    if not 1 <= axes <= len(kinds):
        raise Obstacle(f"it has {axes} axes beside batch and channels; read are 1 to {len(kinds)}")
    return kinds[axes - 1]


def empty_layer(kind: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer whose tensors take no memory; they are put in later."""
    with torch.device("meta"):
        return kind(*args, **kwargs)


def fill_layer(module: nn.Module, **tensors: Any) -> nn.Module:
    """Puts arrays in as parameters or buffers. Raises Obstacle where their shapes are not the layer's own."""
    for name, value in tensors.items():
        own = getattr(module, name)
        if value is None:
            continue
        if own is None or tuple(own.shape) != value.shape:
            raise Obstacle(
                f"its {name} has sizes {list(value.shape)}, expected {[] if own is None else list(own.shape)}"
            )
        tensor = tensor_of(value)
        setattr(module, name, nn.Parameter(tensor) if isinstance(own, nn.Parameter) else tensor)
    return module
