"""A network that is read and rewritten: a torch.fx graph, its layers (modules, or convolutions as data) and shapes. No passes here."""

import operator
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmprune.graph.calls import concatenated
from rmprune.graph.convolution import Conv, Geometry, Pair, Shift, from_module, output_size, pointwise
from rmprune.graph.double import InDouble
from rmprune.graph.obstacle import Obstacle
from rmprune.graph.run import Values, node_value

NodeLayer = nn.Module | Conv
DROPOUTS = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
GONE = ("Identity", *DROPOUTS, "StochasticDepth", "DropPath")
"""Names of modules that give what they are given, outside of training."""
_OPAQUE = ("Conv2dSame", "AvgPool2dSame", "MaxPool2dSame", "BlurPool2d")
GROUP_NORMS = ("GroupNormAct", "GroupNorm", "GroupNorm1", "GroupNorm1Act")
WHOLE = ("BatchNormAct2d", "FrozenBatchNorm2d", *GROUP_NORMS, *_OPAQUE, *GONE)


def named(module: nn.Module, names: tuple[str, ...]) -> bool:
    """A class of torch, torchvision or timm with one of these names; a user's class of the same name may do anything."""
    return type(module).__name__ in names and type(module).__module__.split(".")[0] in ("torch", "torchvision", "timm")


@dataclass
class Network:
    """A normalised network: every call_module node has its own target in `layers`; shapes are in node.meta["shape"].

    decided: where the sizes of the example inputs decided what is computed; it holds for these sizes only then.
    autocast: where the code enters it, frozen: where it stops gradients, dropped: where it drops at random in training, which the graph
    does not.
    """

    graph: fx.Graph
    layers: dict[str, NodeLayer] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    decided: list[str] = field(default_factory=list)
    autocast: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def sizes_note(self) -> str:
        """What to say of a result that holds for the sizes of the example inputs only."""
        places = "; ".join(self.decided)
        return (
            places
            and f"the sizes of the inputs decide what is computed ({places}): this holds for inputs of these sizes only"
        )

    @property
    def note(self) -> str:
        """What to say of a result: of its sizes, and of what it leaves out of the code."""
        left = [f"autocast in forward is left out ({'; '.join(self.autocast)})"] if self.autocast else []
        if self.frozen:
            left.append(f"gradients that forward stops are not stopped ({'; '.join(self.frozen)})")
        if self.dropped:
            left.append(f"what drops at random in training is left out ({'; '.join(self.dropped)})")
        return "; ".join(filter(None, (self.sizes_note, *left)))

    def layer(self, node: fx.Node) -> NodeLayer | None:
        """The layer that a node calls; None where it calls none."""
        return self.layers.get(str(node.target)) if node.op == "call_module" else None

    def own(self, node: fx.Node) -> Any:
        """The layer of a call_module node, the tensor of a get_attr node (None where that is no tensor)."""
        return self.layers[str(node.target)] if node.op == "call_module" else self.constants.get(str(node.target))

    def value(self, node: fx.Node, values: Values) -> Any:
        """The node's value, run in float64; a convolution as data cannot be run."""
        with InDouble():
            return node_value(node, values.__getitem__, self.own)

    def add(self, name: str, layer: NodeLayer) -> str:
        """Registers a layer under a free name like `name` and returns that name."""
        name = free_name(name, self.layers)
        self.layers[name] = layer
        return name

    def insert(self, before: fx.Node, name: str, layer: NodeLayer, source: fx.Node) -> fx.Node:
        """A new layer, under a free name like `name`, that reads `source`; its node stands before `before`."""
        with self.graph.inserting_before(before):
            return self.graph.call_module(self.add(name, layer), (source,))

    def bypass(self, node: fx.Node, by: fx.Node) -> None:
        """Gives the readers of a node `by` in its place, and takes it out."""
        node.replace_all_uses_with(by)
        self.take_out(node)

    def take_out(self, node: fx.Node) -> None:
        """Takes a node out that nothing reads, and its layer."""
        self.graph.erase_node(node)
        if node.op == "call_module":
            self.layers.pop(str(node.target), None)

    def drop_unread(self, *, layers: bool = True) -> None:
        """Takes out what nothing reads; layers among it only if `layers`."""
        stay = ("output", "placeholder") if layers else ("output", "placeholder", "call_module")
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in stay:
                self.take_out(node)


def flat_name(name: str) -> str:
    """A module's name as a flat network has it: layer1.0.conv1 -> layer1_0_conv1."""
    return "".join(c if c.isalnum() else "_" for c in name)


def free_name(name: str, taken: Container[str]) -> str:
    """`name`, or with the first number behind it that is not taken."""
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of what a node gives for the example inputs; None where that is no tensor."""
    return node.meta.get("shape")


def joined_maps(node: fx.Node) -> list[Any]:
    """The maps (N, C, H, W) whose channels a call concatenates; none where it is another call."""
    parts, dim = concatenated(node)
    return parts if dim in (1, -3) and len(shape_of(node) or ()) == 4 else []


def is_batch_norm(layer: NodeLayer | None) -> bool:
    """Whether a layer is a batch norm of torch, of any rank."""
    return isinstance(layer, _BatchNorm)


def linear_layer(network: Network, node: fx.Node) -> Conv:
    """The node as a linear layer; of vectors (N, C), as one of 1x1 maps. Raises Obstacle where it is none."""
    shape = shape_of(node)
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    before = shape_of(source) if source is not None else None
    layer = network.layer(node)
    if isinstance(layer, nn.Linear) and len(shape or ()) == 2:
        return pointwise(layer, str(node.target))
    if source is None or shape is None or before is None or len(shape) != 4 or len(before) != 4:
        raise Obstacle(f"{in_words(network, node)} does not read one map (batch, channels, height, width)")
    if isinstance(layer, Conv):
        return layer
    if layer is not None:
        found = from_module(layer, before[1], str(node.target))
    elif node.target is operator.getitem:
        found = _crop(node, before[1])
    elif node.target is operator.add and isinstance(node.args[1], int | float):
        found = from_module(Shift(torch.tensor(node.args[1], dtype=torch.float64)), before[1], node.name)
    else:
        found = _pad_channels(network, node, before[1])
    if output_size(found.geometry, spatial(source)) != spatial(node):
        raise Obstacle(f"{node.target}: partial windows at the border of this input size (ceil_mode)")
    return found


def _crop(node: fx.Node, channels: int) -> Conv:
    """x[:, a:b, ::r, ::s]: some channels, subsampled."""
    index: Any = node.args[1]
    plain = isinstance(index, tuple) and 2 <= len(index) <= 4 and all(isinstance(i, slice) for i in index)
    if not plain or index[0] != slice(None) or any(i.start or i.stop is not None for i in index[2:]):
        raise Obstacle("an indexing other than x[:, a:b, ::r, ::s]")
    if not all(isinstance(end, int | None) for i in index for end in (i.start, i.stop, i.step)):
        raise Obstacle("an indexing that depends on the input")
    taken = torch.arange(channels)[index[1]]
    steps = [i.step or 1 for i in index[2:]] + [1] * (4 - len(index))
    weight = torch.eye(channels, dtype=torch.float64)[taken][:, :, None, None]
    return Conv(lambda: weight, _zeros(len(taken)), channels, Geometry(stride=(steps[0], steps[1])), name=node.name)


def _pad_channels(network: Network, node: fx.Node, channels: int) -> Conv:
    """F.pad(x, (0, 0, 0, 0, a, b)): channels of zeros before and after."""
    arguments: list[Any] = list(node.args[1:]) + list(node.kwargs.values())
    pad = arguments[0] if arguments else None
    zeros = all(a in ("constant", 0, 0.0, None) for a in arguments[1:])
    if node.target is not torch.nn.functional.pad or not isinstance(pad, list | tuple) or len(pad) < 6 or not zeros:
        raise Obstacle(f"{in_words(network, node)} is no linear layer that a kernel stands for")
    if any(pad[:4]) or any(pad[6:]) or min(pad[4:6]) < 0:
        raise Obstacle("a padding of more than channels")
    weight = torch.cat(
        [torch.zeros(pad[4], channels), torch.eye(channels), torch.zeros(pad[5], channels)]
    ).double()[:, :, None, None]  # fmt: skip
    return Conv(lambda: weight, _zeros(len(weight)), channels, name=node.name)


def _zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.float64)


def spatial(node: fx.Node) -> Pair:
    """(height, width) of what a node gives; (1, 1) where that is no map."""
    shape = shape_of(node)
    return (shape[2], shape[3]) if shape is not None and len(shape) == 4 else (1, 1)


def in_words(network: Network, node: fx.Node) -> str:
    """A node as code: "a MaxPool2d", "a slice, x[:, 8:]", "a call of x.permute(...)"."""
    layer = network.layer(node)
    if isinstance(layer, Conv):
        return "a convolution"
    if isinstance(layer, nn.Module):
        name = type(layer).__name__
        return f"an {name}" if name[0] in "AEIO" else f"a {name}"
    if node.op == "placeholder":
        return "an input of the network"
    if node.op == "get_attr":
        return f"the tensor {node.target}"
    if node.target is operator.getitem:
        index = node.args[1]
        return (
            f"a slice, x[{_code(index)}]" if isinstance(index, tuple | slice) else f"one of several results, x[{index}]"
        )
    if node.op == "call_method":
        return f"a call of x.{node.target}(...)"
    return f"a call of {getattr(node.target, '__name__', node.target)}(...)"


def _code(index: Any) -> str:
    if isinstance(index, tuple):
        return ", ".join(_code(part) for part in index)
    if not isinstance(index, slice):
        return str(index)
    start, stop = ("" if end is None else str(end) for end in (index.start, index.stop))
    return f"{start}:{stop}" + ("" if index.step is None else f":{index.step}")
