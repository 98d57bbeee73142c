"""A network as a flat list of operations with each batch norm joined to the layer before it. Read only; `calibration` and
`rmprune.amc.scoring` run it."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from rmprune.errors import UnsupportedModel
from rmprune.graph.convolution import Scale, plain
from rmprune.graph.in_place import value_apart
from rmprune.graph.network import Network, NodeLayer, is_batch_norm, shape_of
from rmprune.graph.tensors import all_tensors, own_tensors
from rmprune.pruning.groups import Structure
from rmprune.pruning.layers import Weighted
from rmprune.pruning.operations import ELEMENTWISE, operation
from rmprune.pruning.reading import Reading, read

IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.ReLU: F.relu_,
    nn.ReLU6: lambda x: F.hardtanh_(x, 0.0, 6.0),
}
"""Activations that may write over their input where nothing else reads it: a third less memory traffic."""


@dataclass(frozen=True)
class Op:
    """One operation. `layer`: its convolution or linear layer; `norm`: the batch norm joined to it, or standing alone.

    static: no policy changes its values beyond leaving channels out (what lies before the first layer that reads pruned
    channels); origin: the layer whose output channels a static value has; dead: values nobody reads from here on; fresh: a module
    whose only input was made by the layer before it for it alone; shared: its layer or norm, or a tensor of it, has other uses, and stays
    as it was cut.
    """

    node: fx.Node
    kind: Literal["input", "layer", "norm", "vector", "call"]
    inputs: tuple[str, ...]
    layer: str = ""
    norm: str = ""
    static: bool = False
    origin: str = ""
    dead: tuple[str, ...] = ()
    fresh: bool = False
    shared: bool = False

    @property
    def name(self) -> str:
        """The name of its node, by which others read its value."""
        return self.node.name


@dataclass(frozen=True)
class Program:
    """The operations in order, the name of the result, and the static values that others read.

    alias: batch-norm nodes that are part of their layer's operation -> that operation.
    """

    network: Network
    ops: tuple[Op, ...]
    result: str
    frontier: tuple[Op, ...]
    alias: Mapping[str, str]

    def unshared(self) -> "Program":
        """The same program with nothing but the input held as static."""
        ops = (replace(op, static=False) for op in self.ops[1:])
        return replace(self, ops=(self.ops[0], *ops), frontier=(self.ops[0],))

    def call(self, op: Op, values: Mapping[str, Tensor]) -> Tensor:
        """Run an operation of kind "call", which has no tensors of its own, on these values."""

        def value(node: fx.Node) -> Any:
            return values[self.alias.get(node.name, node.name)]

        layer = self.network.layer(op.node)
        if isinstance(layer, Scale):
            return values[op.inputs[0]] * float(layer.factor)  # a number has no precision of its own
        if op.fresh and type(layer) in IN_PLACE:
            return IN_PLACE[type(layer)](values[op.inputs[0]])  # type: ignore[index]
        found: Tensor = value_apart(op.node, value, self.network.layer, self.network.layers)
        return found


def read_program(model: nn.Module, structure: Structure, example_inputs: Tensor) -> Program:
    """The program of a network with one input and one output. Raises UnsupportedModel where it is not such a network."""
    reading = read(model, example_inputs)
    nodes = list(reading.network.graph.nodes)
    if sum(node.op == "placeholder" for node in nodes) != 1 or not isinstance(nodes[-1].args[0], fx.Node):
        raise UnsupportedModel(f"{type(model).__name__}: fitting layers needs a network with one input and one output")
    for node in nodes:
        layer = reading.network.layer(node)
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise UnsupportedModel(
                f"{reading.name(node) or node.target}: fitting layers needs batch norms with running statistics"
            )
    joined = reading.joined_norms()
    norms = {layer: str(reading.name(norm)) for norm, layer in joined.items()}
    alias = {norm.name: layer.name for norm, layer in joined.items()}  # its value is that of its layer's operation
    ops = [_read_op(node, reading, norms, alias) for node in nodes[:-1] if node not in joined]
    result = alias.get(nodes[-1].args[0].name, nodes[-1].args[0].name)
    shared = _shared(model, ops)
    ops = [replace(op, shared=not shared.isdisjoint((op.layer, op.norm))) for op in ops]
    ops = _mark_dead(_mark_static(ops, reading, structure), result)
    readers = {name for op in ops if not op.static for name in op.inputs} | {result}
    frontier = tuple(op for op in ops if op.static and op.name in readers)
    return Program(reading.network, tuple(ops), result, frontier, alias)


def _shared(model: nn.Module, ops: list[Op]) -> set[str]:
    """The layers and norms that run more than once, or have a tensor that another module has, too."""
    uses = Counter(name for op in ops for name in (op.layer, op.norm) if name)
    holders = Counter(id(tensor) for module in model.modules() for _, tensor in own_tensors(module))
    tied = (any(holders[id(tensor)] > 1 for _, tensor in own_tensors(model.get_submodule(name))) for name in uses)
    return {name for (name, count), has in zip(uses.items(), tied, strict=True) if count > 1 or has}


def _read_op(node: fx.Node, reading: Reading, norms: Mapping[fx.Node, str], alias: Mapping[str, str]) -> Op:
    inputs = tuple(alias.get(n.name, n.name) for n in node.all_input_nodes)
    if node.op == "placeholder":
        return Op(node, "input", ())
    if node.op == "get_attr":
        raise UnsupportedModel(f"{node.target}: a tensor that belongs to no layer; fitting layers cannot follow it")
    layer, name = reading.network.layer(node), reading.name(node)
    dims = len(shape_of(node) or ())
    if name is not None and dims not in _fitted(layer):
        raise UnsupportedModel(
            f"{name}: fitting layers cannot follow {type(layer).__name__} layers on values of {dims} dimensions"
        )
    if name is not None and isinstance(layer, nn.Conv2d | nn.Linear):
        if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
            raise UnsupportedModel(f"{name}: fitting layers needs zero padding given as numbers")
        return Op(node, "layer", inputs, layer=name, norm=norms.get(node, ""))
    if name is not None and is_batch_norm(layer):
        return Op(node, "norm", inputs, norm=name)
    if name is not None and isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        return Op(node, "vector", inputs, layer=name)
    number = isinstance(layer, Scale) and layer.factor.numel() == 1 and not layer.factor.is_meta
    if isinstance(layer, nn.Module) and not number and any(True for _ in all_tensors(layer)):
        raise UnsupportedModel(f"{node.target}: a tensor that belongs to no layer; fitting layers cannot follow it")
    return Op(node, "call", inputs)


def _fitted(layer: NodeLayer | None) -> tuple[int, ...]:
    """The dimensions of what a layer may put out for it to be fitted, or passed by."""
    if isinstance(layer, Weighted):
        return (2,) if isinstance(layer, nn.Linear) else (4,) if plain(layer, nn.Conv2d) else ()
    return (2, 4) if is_batch_norm(layer) or isinstance(layer, nn.PReLU) else ()


def _mark_static(ops: list[Op], reading: Reading, structure: Structure) -> list[Op]:
    reads_pruned = {m.layer for group in structure.groups for m in group.members if m.side == "in"}
    static: dict[str, str] = {}
    marked = []
    for op in ops:
        if op.kind == "input":
            static[op.name] = ""
        elif (
            all(name in static for name in op.inputs) and op.layer not in reads_pruned and _keeps_channels(op, reading)
        ):
            static[op.name] = op.layer if op.kind == "layer" else static[op.inputs[0]]
        marked.append(replace(op, static=op.name in static, origin=static.get(op.name, "")))
    return marked


def _keeps_channels(op: Op, reading: Reading) -> bool:
    """Whether a map goes in and a map comes out, whose channels are those of the layer or of what went in."""
    shapes = [shape_of(node) or () for node in (op.node, *op.node.all_input_nodes)]
    if any(len(shape) != 4 for shape in shapes) or op.kind != "call":
        return all(len(shape) == 4 for shape in shapes)
    if reading.network.layer(op.node) is None:
        return operation(op.node, reading.network) in ELEMENTWISE and len(set(shapes)) == 1
    return len(shapes) == 2 and shapes[0][1] == shapes[1][1]


def _mark_dead(ops: list[Op], result: str) -> list[Op]:
    last_use = {name: index for index, op in enumerate(ops) for name in op.inputs}
    dying: dict[int, list[str]] = {}
    for name, index in last_use.items():
        if name != result:
            dying.setdefault(index, []).append(name)
    kinds = {op.name: op.kind for op in ops}
    marked = []
    for index, op in enumerate(ops):
        dead = tuple(dying.get(index, ()))
        own = op.kind == "call" and op.node.op == "call_module" and len(op.inputs) == 1 and op.inputs == dead
        marked.append(replace(op, dead=dead, fresh=own and kinds[op.inputs[0]] in ("layer", "norm")))
    return marked
