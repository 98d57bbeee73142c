"""The prunable groups of any network: by our own walk over a chain, by Torch-Pruning where the network branches."""

import copy
import itertools
import math
import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.pruning.groups import (
    Group,
    Layer,
    Member,
    Structure,
    describe_layer,
    is_depthwise,
    outputs,
    record_shapes,
    tie_positions,
    with_ports,
)
from rmprune.pruning.surgery import shrink


def find_structure(model: nn.Module, example_inputs: Tensor) -> Structure:
    """The groups of channels that can go, the layers they size, and what cannot be pruned and why. Raises
    UnsupportedModel if nothing can.
    """
    structure = chain_structure(model, example_inputs) or dependency_structure(model, example_inputs)
    structure = _without_returned(structure, model, example_inputs)
    if not structure.groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in structure.frozen.items())
        raise UnsupportedModel(
            f"{type(model).__name__}: no channel can be pruned ({reasons or 'no convolution or linear layer'})"
        )
    return structure


def _without_returned(structure: Structure, model: nn.Module, example_inputs: Tensor) -> Structure:
    """Leave groups whole whose channels are in an output although later layers read them too (a backbone's feature maps)."""
    shapes = [x.shape for x in outputs(model, example_inputs)]
    if len(shapes) == 1:
        return structure
    returned = {}
    for group in structure.groups:
        if group.units > 1:
            stay = torch.arange(group.units) > 0
            smaller = shrink(model, {group.name: stay}, structure)[0]
            if [x.shape for x in outputs(smaller, example_inputs)] != shapes:
                returned[group.name] = "its channels are among the network's outputs"
    return structure.without(returned) if returned else structure


# Modules and functions that act on each channel alone and hold nothing of its size.
CHANNELWISE: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU,
    nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Dropout, nn.Dropout2d,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
CHANNELWISE_FUNCTIONS = {
    F.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.leaky_relu, F.silu, F.gelu, F.elu, F.dropout,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.relu, torch.sigmoid, torch.tanh,
}  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def trace_graph(model: nn.Module) -> fx.Graph | None:
    """The graph of the model down to torch's own modules; None where torch.fx cannot follow it."""
    try:
        return fx.Tracer().trace(model)
    except Exception:  # fx raises whatever the model's own code raises on a proxy
        return None


def chain_nodes(graph: fx.Graph) -> list[fx.Node] | None:
    """The nodes between input and output if each reads exactly the one before it, else None."""
    nodes = list(graph.nodes)
    if nodes[0].op != "placeholder" or any(n.op == "placeholder" for n in nodes[1:]):
        return None
    for before, node in itertools.pairwise(nodes):
        if node.all_input_nodes != [before]:
            return None
    return nodes[1:-1]


def is_flatten(node: fx.Node, model: nn.Module) -> bool:
    """Flattening from dimension 1 on, as a module, a function or a method."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return isinstance(module, nn.Flatten) and module.start_dim == 1
    if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
        start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        return isinstance(start, int) and start == 1
    return False


def is_global_mean(node: fx.Node) -> bool:
    """x.mean((2, 3)) without kept dimensions."""
    if node.target is not torch.mean and not (node.op == "call_method" and node.target == "mean"):
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, list | tuple) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]


def is_channelwise(node: fx.Node, model: nn.Module) -> bool:
    """Whether each channel of the result depends on that channel of the input alone, without parameters."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return isinstance(module, CHANNELWISE) or (isinstance(module, nn.PReLU) and module.num_parameters == 1)
    if node.op == "call_function":
        if node.target in (operator.add, operator.mul, operator.truediv):
            return len(node.all_input_nodes) == 1  # with a number
        return node.target in CHANNELWISE_FUNCTIONS or is_global_mean(node)
    return node.op == "call_method" and (
        node.target in ("relu", "relu_", "sigmoid", "tanh", "contiguous") or is_global_mean(node)
    )


class _Walk:
    """What has been seen so far: the open group (whose channels the next layer reads) and the closed ones."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.layers: list[Layer] = []
        self.frozen: dict[str, str] = {}
        self.open: Group | None = None
        self.why: str | None = None

    def join(self, member: Member) -> None:
        if self.open is not None:
            self.open = replace(self.open, members=(*self.open.members, member))

    def close(self) -> None:
        if self.open is None:
            return
        if self.why is None and self.open.consumers:
            self.groups.append(self.open)
        else:
            self.frozen[self.open.name] = self.why or "its channels are the network's output"
        self.open, self.why = None, None


def chain_structure(model: nn.Module, example_inputs: Tensor) -> Structure | None:
    """The groups of a plain chain (nn.Sequential, nested or not, or any module that torch.fx sees as one); None if it
    is not one.
    """
    graph = trace_graph(model)
    nodes = None if graph is None else chain_nodes(graph)
    if nodes is None:
        return None
    targets = [str(n.target) for n in nodes if n.op == "call_module"]
    shapes = record_shapes(model, example_inputs)
    modules = {name: model.get_submodule(name) for name in targets}
    walk = _Walk()
    for node in nodes:
        name = str(node.target)
        module = modules.get(name) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d | nn.Linear):
            layer = describe_layer(name, module, shapes)
            if layer is None or not _pass_layer(walk, layer, module):
                return None
        elif isinstance(module, BATCH_NORMS) or (isinstance(module, nn.PReLU) and module.num_parameters > 1):
            _join_vector(walk, name, module)
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            walk.why = f"{name} ({type(module).__name__}) normalises over channels"
        elif not is_flatten(node, model) and not is_channelwise(node, model):
            return None
    walk.close()
    return with_ports(Structure(tuple(walk.groups), tuple(walk.layers), walk.frozen))


def _join_vector(walk: _Walk, name: str, module: nn.Module) -> None:
    size = module.num_features if isinstance(module, BATCH_NORMS) else module.num_parameters
    if walk.open is not None:
        walk.join(Member(name, "tied", _spread(walk.open, int(size)), int(size)))  # type: ignore[arg-type]


def _pass_layer(walk: _Walk, layer: Layer, module: nn.Module) -> bool:
    """Close the open group at this layer's inputs and open the one of its outputs; a depthwise layer only joins."""
    walk.layers.append(layer)
    if is_depthwise(module):
        if walk.open is not None:
            walk.join(Member(layer.name, "tied", _spread(walk.open, layer.cout), layer.cout))
        return True
    if walk.open is not None:
        if layer.cin % _width(walk.open):
            return False
        walk.join(Member(layer.name, "in", _spread(walk.open, layer.cin), layer.cin))
        if layer.groups > 1:
            if walk.open.multiple > 1:
                walk.why = f"it lies between two grouped convolutions, the second being {layer.name}"
            else:
                walk.open = tie_positions(walk.open, layer.groups)
        walk.close()
    opened = Group(layer.name, layer.cout, (Member(layer.name, "out", torch.arange(layer.cout)[:, None], layer.cout),))
    walk.open = tie_positions(opened, layer.groups) if layer.groups > 1 else opened
    return True


def _width(group: Group) -> int:
    return group.units * group.multiple


def _spread(group: Group, size: int) -> Tensor:
    """[units, k]: where the open group's channels lie in a dimension of ``size`` (after flattening, each is a run of
    H*W features).
    """
    first = next(m for m in group.members if m.side == "out").index
    run = size // first.numel()
    return (first[:, :, None] * run + torch.arange(run)).reshape(group.units, -1)


def dependency_structure(model: nn.Module, example_inputs: Tensor) -> Structure:
    """The groups of any network Torch-Pruning can follow. What cannot be sliced exactly is frozen, with the reason."""
    shapes = record_shapes(model, example_inputs)
    twin = copy.deepcopy(model).requires_grad_(True).eval()
    try:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(twin, example_inputs, verbose=False)
        all_groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear, nn.ConvTranspose2d]))
    except Exception as error:  # whatever it meets in a network that it does not know
        raise UnsupportedModel(
            f"{type(model).__name__}: Torch-Pruning cannot follow this network ({type(error).__name__}: {error})"
        ) from error
    names = {module: name for name, module in twin.named_modules()}
    groups: list[Group] = []
    frozen: dict[str, str] = {}
    for found in all_groups:
        root = names[found[0].dep.target.module]
        try:
            groups.append(_read_group(root, found, graph, names))
        except UnsupportedModel as reason:
            frozen[root] = str(reason)
    layers = [describe_layer(name, module, shapes) for name, module in model.named_modules()]
    structure = Structure(tuple(groups), tuple(x for x in layers if x is not None), frozen)
    return with_ports(_without_overlaps(structure))


def _read_group(root: str, found: tp.Group, graph: tp.DependencyGraph, names: Mapping[nn.Module, str]) -> Group:
    units = len(found[0].idxs)
    members: dict[tuple[str, str], Member] = {}
    parts = 1
    for item in found.items:
        node, module = item.dep.target, item.dep.target.module
        reads = graph.is_in_channel_pruning_fn(item.dep.handler) and isinstance(module, nn.Conv2d | nn.Linear)
        if isinstance(module, nn.Parameter):
            raise UnsupportedModel("a free-standing parameter has these channels")
        depthwise = is_depthwise(module)
        if not node.outputs and (depthwise or not reads):
            raise UnsupportedModel("its channels are the network's output")
        if module not in names:
            continue
        name = names[module]
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or depthwise:
            side = "tied"
        elif isinstance(module, nn.PReLU):
            if module.num_parameters == 1:
                continue
            side = "tied"
        elif isinstance(module, nn.Conv2d | nn.Linear):
            side = "in" if reads else "out"
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                parts = math.lcm(parts, module.groups)
        else:
            raise UnsupportedModel(f"{name} ({type(module).__name__}) has these channels and cannot be sliced")
        index = _index(name, item.idxs, item.root_idxs, units)
        if (name, side) in members and not torch.equal(members[name, side].index, index):
            raise UnsupportedModel(f"{name} meets these channels in two different orders")
        members[name, side] = Member(name, side, index, _size(module, side))  # type: ignore[arg-type]
    group = Group(root, units, tuple(members.values()))
    if not group.consumers:
        raise UnsupportedModel("its channels are the network's output")
    return tie_positions(group, parts) if parts > 1 else group


def _size(module: nn.Module, side: str) -> int:
    """The length of the dimension: of the weight's rows, or of the columns of all convolution groups together."""
    weight = module.weight if isinstance(module.weight, Tensor) else module.running_mean
    assert isinstance(weight, Tensor)
    return weight.shape[1] * getattr(module, "groups", 1) if side == "in" else weight.shape[0]


def _index(name: str, indices: list[int], roots: list[int], units: int) -> Tensor:
    """[units, k]: the channels of this layer that belong to each channel of the root."""
    order = sorted(zip(roots, indices, strict=True))
    counts = torch.bincount(torch.tensor([r for r, _ in order]), minlength=units)
    if len(counts) != units or counts.min() != counts.max():
        raise UnsupportedModel(f"{name} does not use every channel equally often")
    return torch.tensor([i for _, i in order]).view(units, -1)


def _without_overlaps(structure: Structure) -> Structure:
    """Freeze groups that claim the same channel of the same layer twice (their removal would not be independent)."""
    claimed: dict[tuple[str, str], tuple[str, set[int]]] = {}
    bad: dict[str, str] = {}
    for group in structure.groups:
        for member in group.members:
            for side in ("in", "out") if member.side == "tied" else (member.side,):
                mine = set(member.index.flatten().tolist())
                other, taken = claimed.setdefault((member.layer, side), (group.name, set()))
                if len(mine) != member.index.numel() or mine & taken:
                    why = f"{member.layer} uses its channels in more than one way"
                    bad |= dict.fromkeys((group.name, other), why)
                taken |= mine
    return structure.without(bad) if bad else structure
