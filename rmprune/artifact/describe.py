"""A network as a JSON description: layers and graph without weights. rebuild.py reads it back; files are files.py's
business.

`describe` traces with torch.fx (a flat nn.Sequential needs no trace) and writes down only names from vocabulary.py.
Limits: dropout and batch norm called as functions must be in eval mode (tracing freezes their flag), and layers the
forward pass never reaches are left out.
"""

import logging
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.artifact.arguments import encode
from rmprune.errors import UnsupportedModel
from rmprune.graph.calls import module_around
from rmprune.graph.foreign import HOOKS
from rmprune.graph.listed import is_flat_sequential, is_norm_with_activation, stock_norm, traced
from rmprune.graph.tracing import warn_of_left_out
from rmprune.graph.vocabulary import (
    ATTRIBUTES,
    FUNCTION_NAMES,
    IDENTIFIER,
    LAYERS,
    MODULE_PATH,
    TENSOR_METHODS,
    TENSOR_TYPES,
    TRAINING_FLAG,
)

logger = logging.getLogger("rmprune")


def describe(model: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> dict[str, Any]:
    """The architecture of `model` as JSON-able data: layers, graph, tensors shared or frozen; no weights.

    `inputs`: examples, for code that asks for their sizes.
    Returns a dict with `kind` ("sequential" or "graph"), `training`, `layers`, `tensors`, `nodes`, `tied`, `frozen`.
    Raises UnsupportedModel that names the first thing outside the closed list and what to do.
    """
    flat = is_flat_sequential(model)
    for path, module in model.named_modules():
        if any(getattr(module, hooks, None) for hooks in HOOKS):
            where = f"layer {path} ({type(module).__name__})" if path else type(module).__name__
            raise UnsupportedModel(f"{where}: it carries hooks, which a file cannot hold; remove them first")
        if "forward" in vars(module) and (flat or not module._modules):
            raise UnsupportedModel(
                f"{path or type(module).__name__}: its forward was replaced; make that a module of its own"
            )
    graph, decided, autocast, frozen = (None, [], [], []) if flat else traced(model, inputs)
    if autocast:
        raise UnsupportedModel(
            f"{autocast[0]}: forward enters autocast, which a file cannot hold: save it without, and call it under torch.autocast"
        )
    if decided and inputs is not None:
        logger.warning(
            "save: sizes of the inputs decide what is computed (%s): the artifact holds for these", "; ".join(decided)
        )
    warn_of_left_out(frozen=tuple(frozen))
    names = list(model._modules) if flat else _called_layers(model, graph)
    layers = _describe_layers(model, names)
    nodes = [] if graph is None else [_describe_node(node) for node in graph.nodes]
    tensors = [] if graph is None else _describe_tensors(model, graph, layers)
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
    args = spec.read(module)
    for name, check in spec.args.items():
        if not check(args[name]):
            raise UnsupportedModel(f"layer {path} ({kind}): {name}={args[name]!r} is outside what an artifact can hold")
    with torch.device("meta"):
        made = spec.make(args)
    expected = {name: tuple(t.shape) for name, t in made.state_dict().items()}
    for name, value in vars(made).items():
        own = vars(module).get(name, value)
        if isinstance(value, bool | int | float | str) and name[0] != "_" and name != "training" and own != value:
            raise UnsupportedModel(
                f"layer {path} ({kind}): its {name} is {own!r}, where one made anew has {value!r}; an artifact cannot hold that"
            )
    actual = {name: tuple(t.shape) for name, t in module.state_dict().items() if spec.owns(name)}
    if expected != actual:
        raise UnsupportedModel(
            f"layer {path} ({kind}): its tensors {actual} do not fit its arguments, which give {expected}; set them "
            "after changing weights"
        )
    return {"type": kind, "args": args}


def _describe_tensors(model: nn.Module, graph: fx.Graph, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameters and buffers that the graph reads directly, without those of layers that it also calls."""
    found = []
    of_layers = {
        f"{layer['name']}.{name}" for layer in layers for name in model.get_submodule(layer["name"]).state_dict()
    }
    persistent = set(model.state_dict(keep_vars=True))
    for path in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr"):
        if path in of_layers:
            continue
        tensor = attrgetter(path)(model)
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


def _describe_node(node: fx.Node) -> dict[str, Any]:
    target = node.target
    if node.op == "call_function":
        name = FUNCTION_NAMES.get(target)
        if name is None:
            shown = getattr(target, "__name__", str(target))
            raise UnsupportedModel(
                f"{place(node)}: the function {shown!r} is not one an artifact can hold; use a layer or a listed "
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
    elif node.op == "call_method" and target not in TENSOR_METHODS:
        raise UnsupportedModel(f"{place(node)}: the tensor method {target!r} is not one an artifact can hold")
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


def place(node: fx.Node) -> str:
    """The node, and the layer whose code it comes from."""
    path, kind = module_around(node)
    return f"layer {path} ({getattr(kind, '__name__', kind)}), node {node.name}" if path else f"node {node.name}"


def _tensor_paths(model: nn.Module, description: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that belongs into the file, by path; a tensor that two layers share comes twice."""
    for layer in description["layers"]:
        if "same_as" in layer:
            continue
        module = model.get_submodule(layer["name"])
        for name, tensor in module.state_dict(keep_vars=True).items():
            if LAYERS[layer["type"]].owns(name):
                yield f"{layer['name']}.{name}", tensor
    for entry in description["tensors"]:
        yield entry["name"], attrgetter(entry["name"])(model)


def file_tensors(model: nn.Module, description: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors to store, each once: `description["tied"]` says which other paths show the same one."""
    tied = {path for path, _ in description["tied"]}
    return {path: tensor for path, tensor in _tensor_paths(model, description) if path not in tied}
