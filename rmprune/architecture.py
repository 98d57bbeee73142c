"""A network as a JSON description: layers and graph without weights. rebuild.py reads it back; files are artifact.py's
business.

`describe` traces with torch.fx (a flat nn.Sequential needs no trace) and writes down only names from vocabulary.py.
Limits: dropout and batch norm called as functions must be in eval mode (tracing freezes their flag), and layers the
forward pass never reaches are left out.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.vocabulary import (
    ATTRIBUTES,
    FUNCTION_NAMES,
    IDENTIFIER,
    LAYERS,
    METHODS,
    MODULE_PATH,
    TENSOR_TYPES,
    TRAINING_FLAG,
    encode,
)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Tracer(fx.Tracer):
    """Keeps the listed layer types whole and goes through everything else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__name__ in LAYERS and type(m) is LAYERS[type(m).__name__].cls

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """timm's batch norm with its activation inside is traced as a stock batch norm, then what follows it."""
        if not is_norm_with_activation(m):
            return super().call_module(m, forward, args, kwargs)
        x = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        for child in ("drop", "act"):
            if child in m._modules:
                x = m._modules[child](x)  # type: ignore[misc]
        return x


def is_norm_with_activation(module: nn.Module) -> bool:
    """Whether this is timm's BatchNormAct2d, which calls batch norm as a function and so hides it from every pass."""
    return type(module).__name__ == "BatchNormAct2d" and isinstance(module, nn.BatchNorm2d)


def stock_norm(module: nn.Module) -> nn.BatchNorm2d:
    """A stock BatchNorm2d that holds the tensors and children of timm's BatchNormAct2d, and does not call the
    children.
    """
    with torch.device("meta"):
        norm = nn.BatchNorm2d(**LAYERS["BatchNorm2d"].read(module))
    norm._parameters, norm._buffers, norm._modules = module._parameters, module._buffers, module._modules
    norm.training = module.training
    return norm


def trace(model: nn.Module) -> fx.Graph:
    """The torch.fx graph of `model` in terms of the listed layer types; assertions and dead code are dropped.

    Raises UnsupportedModel when torch.fx cannot follow the forward pass. The model is left as it was.
    """
    before = set(model.__dict__)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward code: anything may come out
        raise UnsupportedModel(
            f"{type(model).__name__}: torch.fx cannot trace it ({type(error).__name__}: {str(error)[:200]}); make the "
            "forward pass free of "
            "control flow that depends on values, or convert the part that traces"
        ) from error
    finally:
        constants = {name: model.__dict__.pop(name) for name in set(model.__dict__) - before}
    if constants:
        raise UnsupportedModel(
            f"{type(model).__name__}: the forward pass makes {len(constants)} tensor constant(s); register them as "
            "buffers of the module"
        )
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=_has_effect)
    return graph


def _has_effect(node: fx.Node) -> bool:
    """Whether a node whose result nobody reads must stay: layers keep statistics, in-place operations change their
    argument.
    """
    if node.op in ("placeholder", "output", "call_module"):
        return True
    name = str(getattr(node.target, "__name__", node.target))
    inplace_operator = node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    return name.endswith("_") or inplace_operator or True in (node.kwargs.get("inplace"), *node.args[1:])


def is_flat_sequential(model: nn.Module) -> bool:
    """Whether `model` is exactly an nn.Sequential whose children are all listed layer types."""
    return type(model) is nn.Sequential and all(
        type(child) is getattr(LAYERS.get(type(child).__name__), "cls", None) for child in model._modules.values()
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The architecture of `model` as JSON-able data: layers, graph, tensors shared or frozen; no weights.

    Returns a dict with `kind` ("sequential" or "graph"), `training`, `layers`, `tensors`, `nodes`, `tied`, `frozen`.
    Raises UnsupportedModel that names the first thing outside the closed list and what to do.
    """
    flat = is_flat_sequential(model)
    graph = None if flat else trace(model)
    names = list(model._modules) if flat else _called_layers(model, graph)
    layers = _describe_layers(model, names)
    nodes = [] if graph is None else [_describe_node(node, model) for node in graph.nodes]
    tensors = [] if graph is None else _describe_tensors(model, graph)
    description: dict[str, Any] = {
        "kind": "sequential" if flat else "graph",
        "training": model.training,
        "layers": layers,
        "tensors": tensors,
        "nodes": nodes,
    }
    paths = dict(_tensor_paths(model, description))
    first: dict[int, str] = {}
    description["tied"] = []
    for path, tensor in paths.items():
        if first.setdefault(id(tensor), path) != path:
            description["tied"].append([path, first[id(tensor)]])
    description["frozen"] = [p for p, t in paths.items() if isinstance(t, nn.Parameter) and not t.requires_grad]
    return description


def _called_layers(model: nn.Module, graph: fx.Graph | None) -> list[str]:
    """Paths of the layers that the graph calls, in the model's own order, other names of the same layer included."""
    assert graph is not None
    modules = dict(model.named_modules())
    called = {id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module"}
    return [path for path, module in model.named_modules(remove_duplicate=False) if id(module) in called]


def _describe_layers(model: nn.Module, names: list[str]) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = []
    first: dict[int, str] = {}
    for path in names:
        module = model.get_submodule(path)
        if not MODULE_PATH.fullmatch(path):
            raise UnsupportedModel(f"layer {path!r}: only letters, digits, - and _ may name a layer; rename it")
        if first.setdefault(id(module), path) != path:
            layers.append({"name": path, "same_as": first[id(module)]})
            continue
        layers.append({"name": path, **_describe_layer(path, module)})
        if module.training != model.training:
            layers[-1]["training"] = module.training
    return layers


def _describe_layer(path: str, module: nn.Module) -> dict[str, Any]:
    """Type and arguments of one layer, after checking that they say all there is to say about it."""
    known = stock_norm(module) if is_norm_with_activation(module) else module
    kind = type(known).__name__
    spec = LAYERS.get(kind)
    if spec is None or type(known) is not spec.cls:
        raise UnsupportedModel(
            f"layer {path} ({kind}): not a layer type an artifact can hold; known are {', '.join(LAYERS)}"
        )
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        raise UnsupportedModel(f"layer {path} ({kind}): it carries hooks, which a file cannot hold; remove them first")
    args = spec.read(module)
    for name, check in spec.args.items():
        if not check(args[name]):
            raise UnsupportedModel(f"layer {path} ({kind}): {name}={args[name]!r} is outside what an artifact can hold")
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in spec.make(args).state_dict().items()}
    actual = {name: tuple(t.shape) for name, t in module.state_dict().items() if "." not in name}
    if expected != actual:
        raise UnsupportedModel(
            f"layer {path} ({kind}): its tensors {actual} do not fit its arguments, which give {expected}; set them "
            "after changing weights"
        )
    return {"type": kind, "args": args}


def _describe_tensors(model: nn.Module, graph: fx.Graph) -> list[dict[str, Any]]:
    """Parameters and buffers that the graph reads directly."""
    found = []
    persistent = set(model.state_dict(keep_vars=True))
    for path in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr"):
        owner, _, name = path.rpartition(".")
        tensor = getattr(model.get_submodule(owner), name)
        if not isinstance(tensor, Tensor) or not MODULE_PATH.fullmatch(path):
            raise UnsupportedModel(
                f"attribute {path!r}: the forward pass reads it and it is not a tensor; make it a buffer"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in TENSOR_TYPES:
            raise UnsupportedModel(
                f"attribute {path}: tensors of type {dtype} are not supported; use one of {', '.join(TENSOR_TYPES)}"
            )
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer" if path in persistent else "constant"
        found.append({"name": path, "kind": kind, "shape": list(tensor.shape), "dtype": dtype})
    return found


def _describe_node(node: fx.Node, model: nn.Module) -> dict[str, Any]:
    target = node.target
    if node.op == "call_function":
        name = FUNCTION_NAMES.get(target)
        if name is None:
            shown = getattr(target, "__name__", str(target))
            raise UnsupportedModel(
                f"node {node.name}: the function {shown!r} is not one an artifact can hold; use a layer or a listed "
                "function"
            )
        if target is getattr and node.args[1] not in ATTRIBUTES:
            raise UnsupportedModel(f"node {node.name}: the attribute {node.args[1]!r} of a tensor is not supported")
        if target in TRAINING_FLAG and node.kwargs.get("training", (*node.args, *[False] * 8)[TRAINING_FLAG[target]]):
            raise UnsupportedModel(
                f"node {node.name}: {name} runs in training mode; call model.eval() first, or use the layer of that "
                "name"
            )
        target = name
    elif node.op == "call_method" and target not in METHODS:
        raise UnsupportedModel(f"node {node.name}: the tensor method {target!r} is not one an artifact can hold")
    elif node.op == "placeholder" and not IDENTIFIER.fullmatch(str(target)):
        raise UnsupportedModel(f"input {target!r}: give the forward pass named inputs, not {target}")
    try:
        return {
            "op": node.op,
            "name": node.name,
            "target": str(target),
            "args": [encode(a, node.name) for a in node.args],
            "kwargs": {k: encode(v, node.name) for k, v in node.kwargs.items()},
        }
    except TypeError as error:
        raise UnsupportedModel(f"node {error}") from error


def _tensor_paths(model: nn.Module, description: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that belongs into the file, by path; a tensor that two layers share comes twice."""
    for layer in description["layers"]:
        if "same_as" in layer:
            continue
        module = model.get_submodule(layer["name"])
        for name, tensor in module.state_dict(keep_vars=True).items():
            if "." not in name:
                yield f"{layer['name']}.{name}", tensor
    for entry in description["tensors"]:
        owner, _, name = entry["name"].rpartition(".")
        yield entry["name"], getattr(model.get_submodule(owner), name)


def file_tensors(model: nn.Module, description: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors to store, each once: `description["tied"]` says which other paths show the same one."""
    tied = {path for path, _ in description["tied"]}
    return {path: tensor for path, tensor in _tensor_paths(model, description) if path not in tied}
