"""Runs a network node by node: what its values are and how long they live. What becomes of a value is the caller's affair."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from rmprune.errors import UnsupportedModel

Values = Mapping[fx.Node, Any]


def run(
    graph: fx.Graph,
    inputs: tuple[Any, ...],
    value_of: Callable[[fx.Node, Values], Any],
    later: Mapping[fx.Node, Iterable[fx.Node]] | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Each node in order with its value, `value_of(node, values so far)`; last the output's, which is what the network returns.

    A value is let go after its last reader; `later` names, for a node, what is read there besides its arguments.
    Raises UnsupportedModel where there are more or fewer inputs than the graph takes.
    """
    reads = {node: (*node.all_input_nodes, *(later or {}).get(node, ())) for node in graph.nodes}
    last = {source: node for node, sources in reads.items() for source in sources}
    values = _bind(graph, inputs)
    for node, sources in reads.items():
        value = values[node] = value_of(node, values)
        for source in sources:
            if last[source] is node:
                values.pop(source, None)
        yield node, value


def node_value(node: fx.Node, value: Callable[[fx.Node], Any], own: Callable[[fx.Node], Any]) -> Any:
    """What one node gives. value: the value of a node it reads, or of an input; own: its layer (call_module) or tensor (get_attr)."""
    if node.op == "placeholder":
        return value(node)
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    if node.op == "output":
        return args[0]
    if node.op == "get_attr":
        return own(node)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Any = own(node) if node.op == "call_module" else node.target
    return function(*map(_thawed, args), **_thawed(kwargs))


def _thawed(value: Any) -> Any:
    """With lists and dicts that a function may change, as those of fx cannot be."""
    if isinstance(value, list):
        return list(map(_thawed, value))
    return {key: _thawed(x) for key, x in value.items()} if isinstance(value, dict) else value


def _bind(graph: fx.Graph, inputs: tuple[Any, ...]) -> dict[fx.Node, Any]:
    """{input: its value, or its default}."""
    places = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) > len(places):
        raise UnsupportedModel(f"the network takes fewer inputs than the {len(inputs)} given")
    values = dict(zip(places, inputs, strict=False))
    for node in places[len(inputs) :]:
        if not node.args:
            raise UnsupportedModel(f"the network takes an input {node.target!r} that example_inputs lack")
        values[node] = node.args[0]
    return values


def on_copies(model: nn.Module, *inputs: Tensor) -> Any:
    """What a network gives for inputs that somebody reads again: `x.sub_(mean)`, or a first ReLU in place, writes over what it gets."""
    return model(*(x.clone() for x in inputs))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode for the while, as it is written where it was compiled in place (which takes many seconds for one run); each
    module's own mode is put back."""
    modes = [(m, m.training, vars(m).pop("_compiled_call_impl", None)) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode, compiled in modes:
            module.training = mode
            if compiled is not None:
                module._compiled_call_impl = compiled


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks of modules for the while; they are taken off at the end, and where registering one fails."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield
