"""A network as a flat list of operations with each batch norm joined to the layer before it. Read only; `calibration` and
`rmprune.amc.scoring` run it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.nn import functional as F

from rmprune.errors import UnsupportedModel
from rmprune.pruning.find_groups import BATCH_NORMS, is_flatten, is_global_mean, trace_graph
from rmprune.pruning.groups import Structure

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
    whose only input was made by the layer before it for it alone.
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

    @property
    def name(self) -> str:
        return self.node.name


@dataclass(frozen=True)
class Program:
    """The operations in order, the name of the result, and the static values that others read.

    alias: batch-norm nodes that are part of their layer's operation -> that operation.
    """

    ops: tuple[Op, ...]
    result: str
    frontier: tuple[Op, ...]
    alias: Mapping[str, str]

    def unshared(self) -> "Program":
        """The same program with nothing but the input held as static."""
        ops = (replace(op, static=False) for op in self.ops[1:])
        return replace(self, ops=(self.ops[0], *ops), frontier=(self.ops[0],))

    def call(self, op: Op, model: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
        """Run an operation of kind "call" as it stands in the graph, on these values."""

        def value(node: fx.Node) -> Any:
            return values[self.alias.get(node.name, node.name)]

        args, kwargs = fx.map_arg(op.node.args, value), fx.map_arg(op.node.kwargs, value)
        target: Any = op.node.target
        if op.fresh and type(model.get_submodule(target)) in IN_PLACE:
            return IN_PLACE[type(model.get_submodule(target))](values[op.inputs[0]])
        if op.node.op == "call_module":
            return model.get_submodule(target)(*args, **kwargs)
        if op.node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


def read_program(model: nn.Module, structure: Structure) -> Program:
    """The program of a network with one input and one output. Raises UnsupportedModel where it is not such a network."""
    graph = trace_graph(model)
    if graph is None:
        raise UnsupportedModel(f"{type(model).__name__}: torch.fx cannot trace it; its layers cannot be fitted")
    nodes = list(graph.nodes)
    if sum(node.op == "placeholder" for node in nodes) != 1 or not isinstance(nodes[-1].args[0], fx.Node):
        raise UnsupportedModel(f"{type(model).__name__}: fitting layers needs a network with one input and one output")
    joined = _joined_norms(nodes, model)
    norms = {layer: norm.target for norm, layer in joined.items()}
    alias: dict[str, str] = {}
    ops: list[Op] = []
    for node in nodes[:-1]:
        if node in joined:  # its value is that of its layer's operation
            alias[node.name] = joined[node].name
        else:
            ops.append(_read_op(node, model, norms, alias))
    result = alias.get(nodes[-1].args[0].name, nodes[-1].args[0].name)
    ops = _mark_dead(_mark_static(ops, model, structure), result)
    readers = {name for op in ops if not op.static for name in op.inputs} | {result}
    return Program(tuple(ops), result, tuple(op for op in ops if op.static and op.name in readers), alias)


def _joined_norms(nodes: list[fx.Node], model: nn.Module) -> dict[fx.Node, fx.Node]:
    """{batch-norm node: the layer's node before it}, where nothing else reads that layer."""
    found = {}
    for node in nodes:
        if node.op != "call_module" or not isinstance(model.get_submodule(str(node.target)), BATCH_NORMS):
            continue
        (before,) = node.all_input_nodes
        is_layer = before.op == "call_module" and isinstance(
            model.get_submodule(str(before.target)), nn.Conv2d | nn.Linear
        )
        if is_layer and len(before.users) == 1:
            found[node] = before
    return found


def _read_op(node: fx.Node, model: nn.Module, norms: Mapping[fx.Node, Any], alias: Mapping[str, str]) -> Op:
    inputs = tuple(alias.get(n.name, n.name) for n in node.all_input_nodes)
    if node.op == "placeholder":
        return Op(node, "input", ())
    if node.op == "get_attr":
        raise UnsupportedModel(f"{node.target}: a tensor that belongs to no layer; fitting layers cannot follow it")
    if node.op == "call_module":
        name, module = str(node.target), model.get_submodule(str(node.target))
        if isinstance(module, nn.Conv2d | nn.Linear):
            if isinstance(module, nn.Conv2d) and (isinstance(module.padding, str) or module.padding_mode != "zeros"):
                raise UnsupportedModel(f"{name}: fitting layers needs zero padding given as numbers")
            return Op(node, "layer", inputs, layer=name, norm=str(norms.get(node, "")))
        if isinstance(module, BATCH_NORMS):
            return Op(node, "norm", inputs, norm=name)
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            return Op(node, "vector", inputs, layer=name)
        if any(True for _ in module.parameters()):
            raise UnsupportedModel(f"{name}: fitting layers cannot follow {type(module).__name__} layers")
    return Op(node, "call", inputs)


def _mark_static(ops: list[Op], model: nn.Module, structure: Structure) -> list[Op]:
    reads_pruned = {m.layer for group in structure.groups for m in group.members if m.side == "in"}
    static: dict[str, str] = {}
    marked = []
    for op in ops:
        flat = is_flatten(op.node, model) or is_global_mean(op.node) or op.node.op == "call_method"
        linear = bool(op.layer) and isinstance(model.get_submodule(op.layer), nn.Linear)
        if op.kind == "input":
            static[op.name] = ""
        elif all(name in static for name in op.inputs) and op.layer not in reads_pruned and not (flat or linear):
            static[op.name] = op.layer if op.kind == "layer" else static[op.inputs[0]]
        marked.append(replace(op, static=op.name in static, origin=static.get(op.name, "")))
    return marked


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
