"""A network traced by torch.fx, with what `fx_tracer` knows where it cannot go on; or why it cannot be, in words. It reads no graph."""

import contextlib
import functools
import inspect
import logging
import re
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import TraceError
from torch.utils._pytree import tree_leaves

from rmprune.errors import UnsupportedModel
from rmprune.graph.calls import module_around, name_as_torch
from rmprune.graph.fx_tracer import NO_LENGTH, Tracer

logger = logging.getLogger("rmprune")
_PROXIES = r"<class '[\w.]*_Known\w*'>|'?_Known\w*'?( object)?"  # what Python calls our stand-ins


class Traced(NamedTuple):
    """decided: the places where sizes decided what is in the graph. Those of what is in the code and not in the graph: autocast (where it
    is entered), frozen (where gradients are stopped)."""

    graph: fx.Graph
    decided: list[str]
    autocast: list[str]
    frozen: list[str]


def follow(kind: type[Tracer], model: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> Traced:
    """The torch.fx graph of `model` as a tracer of this kind sees it.

    Arguments of forward that `inputs` do not reach and that are None or flags are taken as they are. First without sizes; where that
    fails, with those of `inputs`, and at last with transformers of torch left whole. Raises UnsupportedModel that names module, line,
    cause and way out.
    """
    _refuse_mixed(model, inputs)
    tried: list[tuple[Tracer, Exception]] = []
    attempts = ((None, False, False), (inputs, False, False), (inputs, True, False), (inputs, True, True))
    for known, held, whole in attempts if inputs is not None else attempts[:1]:
        tracer, before = kind(), set(model.__dict__)
        tracer.inputs, tracer.held, tracer.whole = known, held, whole
        try:
            fixed = _fixed(model, None if inputs is None else len(inputs))
            with _recorded_factories(tracer), _own_caches(model):
                graph = tracer.trace(model, fixed)  # a tuple is taken, too
            _note_origin(graph, model)
            noted = list(tracer.decided), list(tracer.autocast), list(tracer.frozen)
            vars(tracer).clear()  # it stands in a circle, and would hold the network until that is collected
            found = Traced(_cleaned(graph, fixed), *noted)
        except Exception as error:  # tracing runs the user's forward code: anything may come out
            tried.append((tracer, error))
            for name in set(model.__dict__) - before:  # constants of a trace that came to nothing
                del model.__dict__[name]
        else:
            _refuse_written(found.graph)
            return found
    failed = tried[min(1, len(tried) - 1)]
    raise _refusal(model, *failed) from failed[1]


@functools.cache
def warn_of_left_out(autocast: tuple[str, ...] = (), frozen: tuple[str, ...] = ()) -> None:
    """Says in the log, once, what of its code is left out in what is made of a network."""
    if autocast:
        logger.warning(
            "autocast in forward is left out (%s): what is made of the network computes there in the type of its weights; call it "
            "under torch.autocast to have that back",
            "; ".join(autocast),
        )
    if frozen:
        logger.warning(
            "forward stops gradients (%s), what is made of the network does not: what was frozen so is trained with it, unless you freeze "
            "its parameters (requires_grad_(False))",
            "; ".join(frozen),
        )


_FACTORIES = ("zeros", "ones", "full", "empty", "arange")


@contextlib.contextmanager
def _recorded_factories(tracer: Tracer) -> Iterator[None]:
    """torch.zeros(x.size(0), ...) and its kin, which torch.fx does not see, are calls in the graph; autocast that is entered is noted."""

    def recorded(make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", make, args, kwargs)
            return make(*args, **kwargs)

        return call

    kind: Any = torch.autocast
    begin, enter = kind.__init__, kind.__enter__

    def begun(self: Any, device_type: Any, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        known = not isinstance(device_type, fx.Proxy)  # autocast(x.device.type)
        begin(self, device_type if known else "cpu", dtype if known else None, enabled, cache_enabled)

    def entered(self: Any) -> Any:
        if self._enabled:
            tracer.autocast[tracer.place()] = None
        return enter(self)

    own = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, make in own.items():
            setattr(torch, name, recorded(make))
        kind.__init__, kind.__enter__ = begun, entered
        yield
    finally:
        kind.__init__, kind.__enter__ = begin, enter
        for name, make in own.items():
            setattr(torch, name, make)


@contextlib.contextmanager
def _own_caches(model: nn.Module) -> Iterator[None]:
    """Dictionaries in which modules keep what they computed (LeViT's attention biases) are empty for the while, and as before after it."""
    found = [
        (held, dict(held))
        for module in model.modules()
        for name, held in vars(module).items()
        if type(held) is dict and "cache" in name
    ]
    for held, _ in found:
        held.clear()
    try:
        yield
    finally:
        for held, before in found:
            held.clear()
            held.update(before)


def _note_origin(graph: fx.Graph, model: nn.Module) -> None:
    """Which node of the graph that a GraphModule has each node is, in its meta, where tracing gave the same ones."""
    if isinstance(model, fx.GraphModule) and [n.name for n in graph.nodes] == [n.name for n in model.graph.nodes]:
        for node in graph.nodes:
            node.meta["traced_as"] = node.name


def _refuse_mixed(model: nn.Module, inputs: tuple[Tensor, ...] | None) -> None:
    """torch.fx takes `*more` after named arguments for one tensor, and `more[0]` for the first image of it."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    more = next((place for place, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_POSITIONAL), 0)
    if inputs is not None and 0 < more < len(inputs):
        named = ", ".join(p.name for p in parameters[:more])
        raise UnsupportedModel(
            f"{type(model).__name__}: forward takes {named} and *{parameters[more].name}, which torch.fx cannot tell apart: write each "
            "input by its name"
        )


def _fixed(model: nn.Module, count: int | None) -> dict[str, Any] | tuple[Any, ...] | None:
    """What torch.fx is told of the arguments of forward. count: of the inputs given, where there are examples."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if count and len(named) == 1 and named[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return (_symbolic_trace.PH,) * count
    rest = parameters[count:] if count is not None else parameters
    return {p.name: p.default for p in rest if p.default is None or isinstance(p.default, bool)} or None


def _cleaned(graph: fx.Graph, fixed: Any) -> fx.Graph:
    """Without assertions and what only they read, without inputs that are fixed, and torch.ops.aten.add as the torch.add it is."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            _as_function(node)
        name_as_torch(node)
    asserted = [node for node in graph.nodes if node.target in (torch._assert, _symbolic_trace._assert_is_none)]
    for node in asserted:
        _erase(node)
    names = [f"{name}_1" for name in fixed] if isinstance(fixed, dict) else []
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if not node.users and (node.target in names or str(node.target).startswith("*")):
            graph.erase_node(node)
    return graph


def _as_function(node: fx.Node) -> None:
    namespace, _, name = str(node.target).partition(".")
    name = name.partition(".")[0]
    function = getattr(torch, name, None)
    if namespace != "aten" or "self" in node.kwargs:
        return
    if isinstance(function, types.BuiltinFunctionType):
        node.target = function
    elif isinstance(getattr(Tensor, name, None), types.MethodDescriptorType):
        node.op, node.target = "call_method", name


def _refuse_written(graph: fx.Graph) -> None:
    """Who reads what a call writes into `out=` later, the graph does not say."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node.kwargs.get("out") is not None:
            path, _ = module_around(node)
            raise UnsupportedModel(
                f"{f'{path}.' * bool(path)}{node.name} writes into out=: give what it returns a name instead (y = torch.add(y, z))"
            )


def _erase(node: fx.Node) -> None:
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if not source.users and source.op == "call_function" and not source._erased:
            _erase(source)


def _refusal(model: nn.Module, tracer: Tracer, error: Exception) -> UnsupportedModel:
    where, text = tracer.place(error), re.sub(_PROXIES, "a value of the network", " ".join(str(error).split()))
    if isinstance(error, TraceError) and ("decide" in text or "control flow" in text):
        cause = "control flow that depends on the values of tensors"
        way = "write it without (torch.where, a product with a mask), or give the part without it"
        if tracer.inputs is None:
            cause += " or on their sizes"
            way += "; where sizes alone decide, give example_inputs"
    elif isinstance(error, TraceError) or text == NO_LENGTH:
        cause = f"what it goes over has no length that is known ({text[:120]})"
        way = "name the pieces (a, b = x.chunk(2, 1)), or write a loop of a fixed number of steps"
    else:
        cause = f"{type(error).__name__}: {text[:200]}"
        way = "mend it, or give the part of the network without it"
    return UnsupportedModel(f"{where}: torch.fx cannot trace {type(model).__name__}: {cause}; {way}")
