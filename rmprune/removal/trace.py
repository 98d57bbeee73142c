"""A network as a graph of stock modules with known shapes: traces, normalises, propagates shapes. Finds and rewrites nothing."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from rmprune.errors import UnsupportedModel
from rmprune.removal.functional import modules_for
from rmprune.removal.kernels import Conv

Layer = nn.Module | Conv

_GONE = (
    "Identity",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "AlphaDropout",
    "FeatureAlphaDropout",
    "StochasticDepth",
    "DropPath",
)
_OPAQUE = ("Conv2dSame", "AvgPool2dSame", "MaxPool2dSame", "BlurPool2d")
_WHOLE = ("BatchNormAct2d", "FrozenBatchNorm2d", *_OPAQUE, *_GONE)
_WEIGHT_HOOKS = ("WeightNorm", "SpectralNorm")
_IN_PLACE_FUNCTIONS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, torch.relu_)
_SAME_METHODS = ("contiguous", "detach", "float", "double", "to", "type_as")
_VIEW_METHODS = (
    "view", "reshape", "flatten", "chunk", "split", "transpose", "permute", "squeeze", "unsqueeze", "narrow", "unbind", "expand",
    "select", "view_as", "expand_as", "unfold", "t", "swapaxes", "movedim",
)  # fmt: skip
_VIEW_FUNCTIONS = (
    operator.getitem, torch.flatten, torch.chunk, torch.split, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze,
    torch.narrow, torch.unbind, torch.reshape,
)  # fmt: skip


def _named(module: nn.Module, names: tuple[str, ...]) -> bool:
    """A class of torch, torchvision or timm with one of these names; a user's class of the same name may do anything."""
    return type(module).__name__ in names and type(module).__module__.split(".")[0] in ("torch", "torchvision", "timm")


@dataclass
class Network:
    """A normalised network: every call_module node has its own target in `layers`; shapes are in node.meta["shape"]."""

    graph: fx.Graph
    layers: dict[str, Layer] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def layer(self, node: fx.Node) -> Layer | None:
        return self.layers.get(str(node.target)) if node.op == "call_module" else None

    def add(self, name: str, layer: Layer) -> str:
        """Registers a layer under a free name like `name` and returns that name."""
        unique, count = name, 0
        while unique in self.layers:
            count += 1
            unique = f"{name}_{count}"
        self.layers[unique] = layer
        return unique


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    return node.meta.get("shape")


def example_tuple(example_inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)


def reference_copy(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode on the CPU, without the user's hooks. The argument is left alone."""
    try:
        twin = copy.deepcopy(model).cpu().double().eval()
    except RuntimeError as error:
        raise UnsupportedModel(f"the network cannot be copied: {error}") from error
    return freeze(twin).requires_grad_(False)


def freeze(twin: nn.Module) -> nn.Module:
    """Weights that are computed from others (weight norm, spectral norm, parametrizations) become numbers; hooks go."""
    for module in twin.modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ in _WEIGHT_HOOKS:
                hook(module, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
    for module in list(twin.modules()):
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
            # Not remove_parametrizations: the copy shares its made-up class with the original, which that would damage.
            module.__class__ = type(module).__bases__[0]
            del module._modules["parametrizations"]
            for name, value in values.items():
                setattr(module, name, nn.Parameter(value))
    return twin


def has_hooks(model: nn.Module) -> bool:
    """Whether something listens to, or changes, what a module reads or returns."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(type(hook).__name__ not in _WEIGHT_HOOKS for hook in hooks)


class _Tracer(fx.Tracer):
    """Leaves stock modules whole, and classes that merely inherit a stock forward."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _named(m, _WHOLE):
            return True
        inherited = isinstance(m, nn.Conv2d) and type(m)._conv_forward is nn.Conv2d._conv_forward
        inherited = inherited and type(m).forward is nn.Conv2d.forward
        return inherited or super().is_leaf_module(m, module_qualified_name)


def normalise(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> Network:
    """Traces a float64 eval-mode network (`reference_copy`) into stock modules, with shapes.

    Raises UnsupportedModel where torch.fx cannot follow the code, or where the inputs do not fit.
    """
    try:
        traced = _Tracer().trace(model)
    except Exception as error:
        raise UnsupportedModel(
            f"torch.fx cannot trace {type(model).__name__}: {error}. Control flow that depends on tensor values has to go, "
            "or a module with such code be made a leaf by moving it out of the network"
        ) from error
    _undo_in_place(traced, dict(model.named_modules()))
    network = _Normaliser(model, traced).run()
    _propagate_shapes(network, example_inputs)
    return network


def _undo_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """After `x += y` or relu_(x), later readers of x, or of another name for x, see the new value: they are given it.

    Raises UnsupportedModel where a later reader sees the change through a view of another shape.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    same: dict[fx.Node, fx.Node] = {}  # the first name of a value
    storage: dict[fx.Node, fx.Node] = {}  # the first node that shares its memory
    for node in list(graph.nodes):
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        alias = _alias(node, modules)
        same[node] = same[source] if source is not None and alias == "same" else node
        storage[node] = storage[source] if source is not None and alias else node
        if source is None or not _in_place(node, modules):
            continue
        storage[node] = storage[source]
        for other in [n for n in order if order[n] < order[node] and storage.get(n) is storage[source]]:
            later = [user for user in other.users if order[user] > order[node]]
            if later and same[other] is not same[source]:
                raise UnsupportedModel(f"{node.name} changes {other.name} in place through a view; write it out of place")
            for user in later:
                user.replace_input_with(other, node)


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False)) and not _named(modules[str(node.target)], _GONE)
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).startswith("_") and node.target != "requires_grad_"
    return node.target in _IN_PLACE_FUNCTIONS or bool(node.kwargs.get("inplace")) or _positional_in_place(node)


def _positional_in_place(node: fx.Node) -> bool:
    return node.target in (F.relu, F.relu6, F.silu, F.hardswish) and len(node.args) > 1 and bool(node.args[1])


def _alias(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """ "same" where the node is another name for its first argument, "view" where it shares its memory in another shape."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if _named(module, _GONE):
            return "same"
        return "view" if isinstance(module, nn.Flatten | nn.Unflatten) else ""
    if node.op == "call_method" and node.target in _SAME_METHODS or node.target in (F.dropout, F.dropout2d):
        return "same"
    if node.op == "call_method" and node.target in _VIEW_METHODS or node.target in _VIEW_FUNCTIONS:
        return "view"
    return ""


class _Normaliser:
    def __init__(self, model: nn.Module, traced: fx.Graph) -> None:
        self.modules = dict(model.named_modules())
        self.model = model
        self.traced = traced
        self.network = Network(fx.Graph())
        self.env: dict[fx.Node, fx.Node] = {}
        self.twins: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(self) -> Network:
        for node in self.traced.nodes:
            if node.op == "call_function" and node.target is torch._assert:
                continue
            if node.op == "call_module":
                self._module(node)
            elif node.op in ("call_function", "call_method"):
                self._call(node)
            else:
                self._keep(node)
        for node in reversed(list(self.network.graph.nodes)):
            if not node.users and node.op not in ("output", "placeholder"):
                self.network.graph.erase_node(node)
                self.network.layers.pop(str(node.target), None)
        return self.network

    def _module(self, node: fx.Node) -> None:
        module = self.modules[str(node.target)]
        if len(node.args) != 1 or node.kwargs:
            self._put(node, [module]) if len(node.args) == 1 else self._keep(node)
            return
        self._put(node, _stock(module))

    def _call(self, node: fx.Node) -> None:
        found = modules_for(node, self._constant)
        if found is None:
            self._keep(node)
        else:
            self._put(node, [module.double().eval() for module in found], _own_name(node))

    def _constant(self, value: Any) -> Any:
        if isinstance(value, fx.Node) and value.op == "get_attr":
            return operator.attrgetter(str(value.target))(self.model)
        return value

    def _put(self, node: fx.Node, modules: list[nn.Module], name: str | None = None) -> None:
        current = self.env[node.args[0]] if isinstance(node.args[0], fx.Node) else None
        assert current is not None, node
        for module in modules:
            key = (current, repr(module))
            if key in self.twins and not list(module.parameters()) and not list(module.buffers()):
                current = self.twins[key]  # relu(x) written twice is one value
                continue
            suffix = "" if module is modules[0] else "_" + type(module).__name__.lower()
            target = self.network.add((name or str(node.target)) + suffix, module)
            current = self.twins[key] = self._annotated(self.network.graph.call_module(target, (current,)), node)
        self.env[node] = current

    def _keep(self, node: fx.Node) -> None:
        copied = self.network.graph.node_copy(node, lambda n: self.env[n])
        self.env[node] = copied
        if node.op == "call_module":
            copied.target = self.network.add(str(node.target), self.modules[str(node.target)])
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.model)
            if isinstance(value, Tensor):
                self.network.constants[str(node.target)] = value.detach()

    def _annotated(self, new: fx.Node, old: fx.Node) -> fx.Node:
        new.meta = dict(old.meta)
        return new


def _own_name(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    prefix = stack[-1][0] if stack else ""
    plain = node.name.rstrip("0123456789").rstrip("_")
    return f"{prefix}.{plain}" if prefix else plain


def _stock(module: nn.Module) -> list[nn.Module]:
    """What a module does in eval mode, as stock modules."""
    if _named(module, _GONE):
        return []
    if _named(module, ("BatchNormAct2d",)):
        return [_plain_norm(module), *_stock(module.drop), *_stock(module.act)]  # type: ignore[arg-type]
    if _named(module, ("FrozenBatchNorm2d",)):
        return [_plain_norm(module)]
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False  # type: ignore[assignment]
    return [module]


def _plain_norm(module: Any) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(len(module.running_mean), eps=module.eps, dtype=torch.float64)
    plain.running_mean, plain.running_var = module.running_mean, module.running_var
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            setattr(plain, name, nn.Parameter(getattr(module, name), requires_grad=False))
    return plain.eval()


def _propagate_shapes(network: Network, example_inputs: tuple[Tensor, ...]) -> None:
    """Runs the graph on the meta device and notes the shape of every tensor."""
    values: dict[fx.Node, Any] = {}
    given = iter(example_inputs)
    for node in network.graph.nodes:
        if node.op == "placeholder":
            values[node] = _input(next(given, None), node)
        elif node.op == "get_attr":
            values[node] = _meta(network.constants.get(str(node.target)))
        elif node.op == "output":
            continue
        else:
            values[node] = _run_meta(network, node, fx.map_arg((node.args, node.kwargs), lambda n: values[n]))
        if isinstance(values[node], Tensor):
            node.meta["shape"] = tuple(values[node].shape)
        else:
            node.meta.pop("shape", None)
    if next(given, None) is not None:
        raise UnsupportedModel(f"the network takes fewer inputs than the {len(example_inputs)} given")


def _input(value: Tensor | None, node: fx.Node) -> Tensor | Any:
    if value is not None:
        return torch.empty(
            value.shape, dtype=torch.float64 if value.is_floating_point() else value.dtype, device="meta"
        )
    if node.args:
        return node.args[0]
    raise UnsupportedModel(f"the network takes an input {node.target!r} that example_inputs lack")


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _run_meta(network: Network, node: fx.Node, arguments: Any) -> Any:
    args, kwargs = arguments
    try:
        if node.op == "call_module":
            module = network.layer(node)
            assert isinstance(module, nn.Module)
            tensors = (*module.parameters(), *module.buffers())
            twin = copy.deepcopy(module, {id(tensor): _meta_like(tensor) for tensor in tensors})
            return twin(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
    except Exception as error:
        inputs = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
        raise UnsupportedModel(f"{node.target}: fails on inputs of shape {inputs}: {error}") from error


def _meta_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def is_batch_norm(layer: Layer | None) -> bool:
    return isinstance(layer, _BatchNorm)
