"""The way back from a description to a network, every name, range and reference checked first; weights are
files.py's business.

A description comes from outside. Layer types and functions are looked up in the closed lists of vocabulary.py, and the
names that torch.fx writes into the code it generates must be plain identifiers.
"""

import keyword
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.artifact.arguments import decode
from rmprune.artifact.describe import file_tensors
from rmprune.artifact.tensors import is_plain
from rmprune.errors import ArtifactError, first_line
from rmprune.graph.foreign import unbound
from rmprune.graph.names import spelled
from rmprune.graph.vocabulary import (
    ATTRIBUTES,
    FUNCTIONS,
    IDENTIFIER,
    LAYERS,
    MAX_CHANNELS,
    MAX_ENTRIES,
    MODULE_PATH,
    TENSOR_DTYPES,
    TENSOR_METHODS,
    TENSOR_TYPES,
)

_TENSOR_KINDS = ("parameter", "buffer", "constant")


def build(description: Any, *, device: torch.device | str = "cpu") -> nn.Module:
    """The network of `description` with fresh weights: a flat nn.Sequential, or a torch.fx.GraphModule.

    Everything is checked first: types from the closed list, arguments in range, references to earlier nodes only.
    ArtifactError says what is wrong. With `device="meta"` nothing is allocated.
    """
    _check_fields(description)
    root: nn.Module = nn.Sequential() if description["kind"] == "sequential" else nn.Module()
    with torch.device(device):
        for layer in description["layers"]:
            _put(root, layer["name"], _build_layer(root, layer, bool(description["training"])))
        for entry in description["tensors"]:
            _put(root, entry["name"], _build_tensor(entry))
    tied = {path for path, _ in description["tied"]}
    for path, first in description["tied"]:
        tensor = get_tensor(root, first)
        if first in tied:
            raise ArtifactError(f"tensor {path} is tied to {first}, which is tied itself; write the artifact again")
        if tensor.shape != get_tensor(root, path).shape:
            raise ArtifactError(f"tied tensors {path} and {first} differ in shape; write the artifact again")
        set_tensor(root, path, tensor)
    for path in description["frozen"]:
        get_tensor(root, path).requires_grad_(False)
    if description["kind"] == "sequential":
        root.training = bool(description["training"])
        return root
    return _graph_module(root, _build_graph(root, description["nodes"]), bool(description["training"]))


def fill(model: nn.Module, description: dict[str, Any], tensors: Mapping[str, Tensor]) -> set[str]:
    """Puts `tensors` (by path) into the network that `build` made of `description` on the meta device; returns the paths used.

    Every name, shape and type is compared, and nothing allocated. ArtifactError names the first that is missing or differs.
    """
    blanks = file_tensors(model, description)
    for name, blank in blanks.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ArtifactError(f"there is no tensor {name} among the weights")
        if not is_plain(tensor) or tensor.shape != blank.shape:
            raise ArtifactError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(blank.shape)}")
        floating = tensor.dtype in TENSOR_DTYPES and tensor.is_floating_point() and blank.is_floating_point()
        if tensor.dtype != blank.dtype and not floating:
            raise ArtifactError(f"{name} is {tensor.dtype}, expected {blank.dtype}")
        if isinstance(blank, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=blank.requires_grad)
        set_tensor(model, name, tensor)
    for path, first in description["tied"]:
        set_tensor(model, path, get_tensor(model, first))
    return set(blanks)


def _graph_module(root: nn.Module, graph: fx.Graph, training: bool) -> fx.GraphModule:
    """A GraphModule that holds exactly what `root` holds, in that order and under those names."""
    try:
        model = fx.GraphModule(root, graph, class_name="Loaded")
        for held in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            setattr(model, held, getattr(root, held))
        for module in model.modules():
            if type(module).__name__ not in LAYERS:
                module.training = training
        return unbound(model)
    except Exception as error:  # the graph passed every check, yet torch.fx may know one more
        raise ArtifactError(f"torch.fx refuses the graph ({error}); the description is damaged") from error


def _check_fields(description: Any) -> None:
    fields = {"kind": str, "training": bool}
    fields |= dict.fromkeys(("layers", "tensors", "nodes", "tied", "frozen"), list)
    if not isinstance(description, dict):
        raise ArtifactError("the description is not a JSON object; write the artifact again")
    for name, kind in fields.items():
        if not isinstance(description.get(name), kind):
            raise ArtifactError(f"the description has no valid {name!r}; it is damaged or not from rmprune")
    if description["kind"] not in ("sequential", "graph"):
        raise ArtifactError(f"the description is of kind {description['kind'][:80]!r}, not 'sequential' or 'graph'")
    for name in ("layers", "tensors", "nodes"):
        for entry in description[name]:
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise ArtifactError(f"the description has an entry without a name in {name!r}; it is damaged")
    for entry in (*description["layers"], *description["tensors"]):
        if not MODULE_PATH.fullmatch(entry["name"]):
            raise ArtifactError(f"{entry['name'][:80]!r} is not a valid name; the description is damaged")
    entries = sum(len(description[name]) for name in ("layers", "tensors", "nodes", "tied", "frozen"))
    if entries > MAX_ENTRIES:
        raise ArtifactError(f"the description has {entries} entries, more than the {MAX_ENTRIES} that are read")
    if not all(isinstance(t, list) and len(t) == 2 and all(isinstance(p, str) for p in t) for t in description["tied"]):
        raise ArtifactError("'tied' does not hold pairs of names; the description is damaged")
    if not all(isinstance(p, str) for p in description["frozen"]):
        raise ArtifactError("'frozen' does not hold names; the description is damaged")
    if description["kind"] == "sequential" and any("." in layer["name"] for layer in description["layers"]):
        raise ArtifactError("a layer of a flat network has a dot in its name; the description is damaged")


def _build_layer(root: nn.Module, layer: dict[str, Any], training: bool) -> nn.Module:
    where = f"layer {layer['name']}"
    if "same_as" in layer:
        same = _get_module(root, layer["same_as"], where)
        if type(same).__name__ not in LAYERS:
            raise ArtifactError(f"{where}: {str(layer['same_as'])[:80]!r} is not a layer; the description is damaged")
        return same
    spec = LAYERS.get(str(layer.get("type")))
    if spec is None:
        raise ArtifactError(
            f"{where}: {str(layer.get('type'))[:80]!r} is not a layer type this version of rmprune knows"
        )
    args = layer.get("args")
    if isinstance(args, dict):
        args = dict.fromkeys(spec.added) | args
    if not isinstance(args, dict) or set(args) != set(spec.args):
        raise ArtifactError(f"{where}: its arguments are not exactly {', '.join(spec.args) or 'none'}")
    for name, check in spec.args.items():
        if not check(args[name]):
            raise ArtifactError(f"{where}: {name}={str(args[name])[:80]} is out of range")
    try:
        module = spec.make(args)
    except Exception as error:  # constructors of layers assert, divide and index
        raise ArtifactError(f"{where}: {layer['type']} refuses its arguments ({first_line(error)})") from error
    return module.train(bool(layer.get("training", training)))


def _build_tensor(entry: dict[str, Any]) -> tuple[Tensor, str]:
    shape, dtype, kind = entry.get("shape"), TENSOR_TYPES.get(str(entry.get("dtype"))), entry.get("kind")
    good = isinstance(shape, list) and all(type(n) is int and 0 <= n <= MAX_CHANNELS for n in shape)
    if (
        not isinstance(shape, list)
        or not good
        or math.prod(shape) > 2**34
        or dtype is None
        or kind not in _TENSOR_KINDS
    ):
        raise ArtifactError(f"tensor {entry['name']}: its shape, type or kind is not valid")
    return torch.zeros(shape, dtype=dtype), kind


def _put(root: nn.Module, path: str, thing: nn.Module | tuple[Tensor, str]) -> None:
    """Sets a layer or tensor at `path`, making plain containers on the way; an occupied name is an error."""
    *owners, name = path.split(".")
    module = root
    for owner in owners:
        if owner not in module._modules and not hasattr(module, owner):
            module.add_module(owner, nn.Module())
        module = _get_module(module, owner, path)
    if isinstance(thing, nn.Module) and any(inner is module for inner in thing.modules()):
        raise ArtifactError(f"{path}: the layer would lie within itself; the description is damaged")
    if hasattr(module, name):
        raise ArtifactError(f"{path}: the name is taken; the description is damaged")
    if isinstance(thing, nn.Module):
        module.add_module(name, thing)
    elif thing[1] == "parameter":
        module.register_parameter(name, nn.Parameter(thing[0], requires_grad=thing[0].is_floating_point()))
    else:
        module.register_buffer(name, thing[0], persistent=thing[1] == "buffer")


def _get_module(root: nn.Module, path: Any, where: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except (AttributeError, TypeError) as error:
        raise ArtifactError(
            f"{where}: there is no layer {str(path)[:80]!r} before it; the description is damaged"
        ) from error


def get_tensor(root: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at `path`; ArtifactError where there is none."""
    owner, _, name = path.rpartition(".")
    module = _get_module(root, owner, path)
    tensor = module._parameters.get(name, module._buffers.get(name))
    if tensor is None:
        raise ArtifactError(f"there is no tensor {path[:80]!r}; the description is damaged")
    return tensor


def set_tensor(root: nn.Module, path: str, tensor: Tensor) -> None:
    """Puts `tensor` in the place of the parameter or buffer at `path`, which must exist."""
    owner, _, name = path.rpartition(".")
    module = root.get_submodule(owner)
    if name in module._parameters:
        module._parameters[name] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    else:
        module._buffers[name] = tensor


def _build_graph(root: nn.Module, entries: list[dict[str, Any]]) -> fx.Graph:
    """The torch.fx graph. Names end up in generated code, so they must be plain identifiers (and paths), checked here."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for position, entry in enumerate(entries):
        name, where = entry["name"], f"node {entry['name'][:80]}"
        if not IDENTIFIER.fullmatch(name) or keyword.iskeyword(name) or name in nodes:
            raise ArtifactError(f"{where}: not a usable name, or used twice")
        op, target = entry.get("op"), entry.get("target")
        if (
            not isinstance(target, str)
            or not isinstance(entry.get("args"), list)
            or not isinstance(entry.get("kwargs"), dict)
        ):
            raise ArtifactError(f"{where}: it has no valid target or arguments")
        args = tuple(decode(a, nodes, where) for a in entry["args"])
        kwargs = {k: decode(v, nodes, where) for k, v in entry["kwargs"].items()}
        if not all(IDENTIFIER.fullmatch(k) and not keyword.iskeyword(k) for k in kwargs):
            raise ArtifactError(f"{where}: an argument has no usable name")
        if op == "output" and position == len(entries) - 1:
            graph.output(args[0] if args else None)
            continue
        if op == "placeholder":
            if not IDENTIFIER.fullmatch(target) or keyword.iskeyword(target):
                raise ArtifactError(f"{where}: the input {target[:80]!r} has no usable name")
        elif op == "call_module":
            if type(_get_module(root, target, where)).__name__ not in LAYERS:
                raise ArtifactError(f"{where}: {target!r} is not a layer")
        elif op == "get_attr":
            get_tensor(root, target)
        elif op == "call_method":
            if target not in TENSOR_METHODS or not args or not isinstance(args[0], fx.Node):
                raise ArtifactError(f"{where}: {target[:80]!r} is not a tensor method that an artifact may call")
        elif op == "call_function":
            if target not in FUNCTIONS:
                raise ArtifactError(f"{where}: {target[:80]!r} is not a function that an artifact may call")
            read = args[1:] if isinstance(args[0] if args else None, fx.Node) and not kwargs else ()
            if target == "getattr" and not (len(read) == 1 and isinstance(read[0], str) and read[0] in ATTRIBUTES):
                raise ArtifactError(f"{where}: only {', '.join(sorted(ATTRIBUTES))} may be read from a tensor")
        else:
            raise ArtifactError(f"{where}: {str(op)[:80]!r} is not an operation at this place")
        nodes[name] = graph.create_node(
            op, FUNCTIONS[target] if op == "call_function" else spelled(target), args, kwargs, name=name
        )
    if not entries or entries[-1].get("op") != "output":
        raise ArtifactError("the graph does not end in an output; the description is damaged")
    return graph
