"""torch.fx's tracer, helped by the sizes of the example inputs where it cannot go on, and the refusal where that is no help either."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import operator
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import Attribute, TraceError
from torch.utils._pytree import tree_leaves

from rmprune.errors import UnsupportedModel
from rmprune.graph.calls import CHUNKS, IN_PLACE_OPERATORS, piece_sizes, set_item
from rmprune.graph.run import node_value
from rmprune.graph.shapes import WithoutValues, blank, blank_inputs, floating_dtype, to_run

_SIZES = ("shape", "size", "numel", "nelement", "stride")
_PLACES = ("device", "is_cuda", "is_cpu", "is_meta")
_OURS, _TORCH = Path(__file__).parents[1], Path(torch.__file__).parent


def _is_network(file: str) -> bool:
    """Whether a file is of the code that is traced: a network of ours, or anyone's but torch's."""
    parents = Path(file).parents
    return file[:1] != "<" and _TORCH not in parents and (_OURS not in parents or _OURS / "models" in parents)


class Tracer(fx.Tracer):
    """fx's tracer. With `inputs` it runs the network without values on the way, so that sizes and numbers made of them decide.

    decided: the places where sizes did; what is traced then holds for these sizes only.
    """

    inputs: tuple[Tensor, ...] | None = None
    held = False  # whether tensors that modules hold beside their parameters are read in the graph, too
    whole = False  # whether modules of torch that are made of layers are one layer each

    def __init__(self) -> None:
        super().__init__()
        self.decided: dict[str, None] = {}
        self.values: dict[fx.Node, Any] = {}
        self.sized: set[fx.Node] = set()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Known(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        found = super().getattr(attr, attr_val, parameter_proxy_cache)
        if not self.held or not isinstance(found, Tensor):
            return found
        names = {id(t): name for name, t in self.root.named_buffers()} | {
            id(t): n for t, n in self.tensor_attrs.items()
        }
        name = names.get(id(found))
        return found if name is None else self.create_proxy("get_attr", name, (), {})

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """`forward(self, x, *more, **others)` is called with x alone."""
        call, own = super().create_args_for_root(*args, **kwargs)
        for place, value in enumerate(own):
            name = str(value.node.target) if isinstance(value, fx.Proxy) else ""
            if place > 1 and name.startswith("*"):
                self.graph.erase_node(value.node)
                own[place] = {} if name.startswith("**") else ()
        return call, own

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        if self.inputs is not None and kind != "output":
            self._know(node)
        return node

    @torch.no_grad()
    def _know(self, node: fx.Node) -> None:
        """Notes the node's value, without its numbers where that is a tensor; what cannot be run so stays unknown."""
        assert self.inputs is not None
        if node.op == "placeholder":
            place = sum(n.op == "placeholder" for n in self.values)
            own = blank_inputs(self.inputs, floating_dtype(self.root))
            if place < len(own) or node.args:
                self.values[node] = own[place] if place < len(own) else node.args[0]
            return
        try:
            if node.target is getattr and node.args[1] in _PLACES:
                self.values[node] = getattr(self.inputs[0], str(node.args[1]))
            else:
                with _untraced(), WithoutValues():
                    self.values[node] = node_value(node, self.values.__getitem__, self._own)
        except Exception:  # the user's own function, or an operator without a rule for shapes
            return
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(self.values[node])) and self._of_sizes(node):
            self.sized.add(node)

    def _own(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            return to_run(self.root.get_submodule(str(node.target)))
        value = operator.attrgetter(str(node.target))(self.root)
        return blank(value) if isinstance(value, Tensor) else value

    def _of_sizes(self, node: fx.Node) -> bool:
        """Whether a number depends on sizes other than the channels, which the layers fix."""
        read = node.args[1] if node.target is getattr else node.target
        if read in _SIZES:
            return not (read == "size" and node.args[1:] == (1,))
        entry = node.target is operator.getitem and isinstance(self.values.get(node.args[0]), torch.Size)  # type: ignore[arg-type]
        return not (entry and node.args[1] == 1) and any(source in self.sized for source in node.all_input_nodes)

    def known(self, proxy: fx.Proxy) -> Any:
        """The value of a proxy that Python asks for. Raises TraceError where that is a tensor's, or unknown."""
        value = self.values.get(proxy.node, _UNKNOWN)
        if value is _UNKNOWN or isinstance(value, Tensor):
            raise TraceError("the values of a tensor decide what is computed")
        if proxy.node in self.sized:
            self.decided[self.place() or proxy.node.name] = None
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        return super().to_bool(obj) if self.inputs is None else bool(self.known(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        count = length(self, obj)
        return super().iter(obj) if count is None else (obj[i] for i in range(count))  # type: ignore[index]

    def place(self, error: BaseException | None = None) -> str:
        """The module being traced and the line of its code: "layer1.0 (Block), net.py line 12, `if x.mean() > 0:`"."""
        frames = traceback.extract_tb(error.__traceback__) if error is not None else traceback.extract_stack()
        module = list(self.module_stack.values())[-1:] or [("", type(self.root))]
        path, kind = module[0]
        name = getattr(kind, "__name__", str(kind).rsplit(".", 1)[-1])
        said = [f"{path} ({name})" if path else name]
        for frame in [frame for frame in frames if _is_network(frame.filename)][-1:]:
            line = linecache.getline(frame.filename, frame.lineno or 0).strip()
            said.append(f"{Path(frame.filename).name} line {frame.lineno}" + (f", `{line[:80]}`" if line else ""))
        return ", ".join(said)


_UNKNOWN = object()
_PROXIES = r"<class '[\w.]*_Known\w*'>|'?_Known\w*'?( object)?"  # what Python calls our stand-ins
_NO_LENGTH = "the length of this value is not known while the network is traced"


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Modules run as ever: torch.fx has put its own call and lookup in their place."""
    ours = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__, nn.Module.__getattr__ = _symbolic_trace._orig_module_call, _symbolic_trace._orig_module_getattr  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = ours  # type: ignore[method-assign]


_FACTORIES = ("zeros", "ones", "full", "empty", "arange")


@contextlib.contextmanager
def _recorded_factories(tracer: Tracer) -> Iterator[None]:
    """torch.zeros(x.size(0), ...) and its kin, which torch.fx does not see, are calls in the graph; autocast that is off is left out."""

    def recorded(make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", make, args, kwargs)
            return make(*args, **kwargs)

        return call

    def autocast(device_type: Any, *args: Any, **kwargs: Any) -> Any:
        off = isinstance(device_type, fx.Proxy) and kwargs.get("enabled") is False
        return contextlib.nullcontext() if off else own["autocast"](device_type, *args, **kwargs)

    own = {name: getattr(torch, name) for name in (*_FACTORIES, "autocast")}
    try:
        for name, make in own.items():
            setattr(torch, name, autocast if name == "autocast" else recorded(make))
        yield
    finally:
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


class _Known(fx.Proxy):
    """A proxy that Python may ask for its length, or for its number where it is one made of sizes."""

    def __getattr__(self, name: str) -> Any:
        return _KnownAttribute(self, name)

    def __len__(self) -> int:
        count = length(self.tracer, self)  # type: ignore[arg-type]
        if count is None:
            raise TypeError(_NO_LENGTH)  # `list` asks for it, goes on where there is none, and asks for the entries
        return count

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", set_item, (self, index, value), {})

    def __int__(self) -> int:
        return int(self.tracer.known(self))  # type: ignore[attr-defined]

    def __float__(self) -> float:
        return float(self.tracer.known(self))  # type: ignore[attr-defined]

    def __index__(self) -> int:
        return operator.index(self.tracer.known(self))  # type: ignore[attr-defined]


def _in_place(operation: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


# torch.fx takes `y += z` for `y = y + z`, and other names of y would keep the old value
for _name, _operation in IN_PLACE_OPERATORS.items():
    setattr(_Known, f"__{_name}__", _in_place(_operation))


class _KnownAttribute(_Known, Attribute):
    """`x.shape`, or the method of a call."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        Attribute.__init__(self, root, attr)

    node = Attribute.node
    __call__ = Attribute.__call__


def length(tracer: Tracer, proxy: fx.Proxy) -> int | None:
    """How many entries a value has; a tensor's, and how many pieces it is cut into, depend on its sizes."""
    value, pieces = tracer.values.get(proxy.node), _pieces(proxy.node)
    if pieces is not None or value is None:
        return pieces
    if not isinstance(value, Tensor | tuple | list) or (isinstance(value, Tensor) and value.dim() == 0):
        return None
    if not isinstance(value, torch.Size):
        tracer.decided[tracer.place() or proxy.node.name] = None
    return len(value)


def _pieces(node: fx.Node) -> int | None:
    """The number of pieces that `chunk(n)` and `split([a, b])` are written to give."""
    given = piece_sizes(node)
    if node.target in CHUNKS:
        return given if isinstance(given, int) else None
    return len(given) if isinstance(given, tuple | list) else None


def follow(
    kind: type[Tracer], model: nn.Module, inputs: tuple[Tensor, ...] | None = None
) -> tuple[fx.Graph, list[str]]:
    """The torch.fx graph of `model` as a tracer of this kind sees it, and where sizes decided what is in it.

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
                graph = tracer.trace(model, fixed)  # type: ignore[arg-type]  # a tuple is taken, too
            _note_origin(graph, model)
            decided = list(tracer.decided)
            vars(tracer).clear()  # it stands in a circle, and would hold the network until that is collected
            return _cleaned(graph, fixed), decided
        except Exception as error:  # tracing runs the user's forward code: anything may come out
            tried.append((tracer, error))
            for name in set(model.__dict__) - before:  # constants of a trace that came to nothing
                del model.__dict__[name]
    failed = tried[min(1, len(tried) - 1)]
    raise _refusal(model, *failed) from failed[1]


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
    if count and len(parameters) == 1 and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return (_symbolic_trace.PH,) * count
    rest = parameters[count:] if count is not None else parameters
    return {p.name: p.default for p in rest if p.default is None or isinstance(p.default, bool)} or None


def _cleaned(graph: fx.Graph, fixed: Any) -> fx.Graph:
    """Without assertions and what only they read, and without inputs that are fixed."""
    asserted = [node for node in graph.nodes if node.target in (torch._assert, _symbolic_trace._assert_is_none)]
    for node in asserted:
        _erase(node)
    names = [f"{name}_1" for name in fixed] if isinstance(fixed, dict) else []
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if not node.users and (node.target in names or str(node.target).startswith("*")):
            graph.erase_node(node)
    return graph


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
    elif isinstance(error, TraceError) or text == _NO_LENGTH:
        cause = f"what it goes over has no length that is known ({text[:120]})"
        way = "name the pieces (a, b = x.chunk(2, 1)), or write a loop of a fixed number of steps"
    else:
        cause = f"{type(error).__name__}: {text[:200]}"
        way = "mend it, or give the part of the network without it"
    return UnsupportedModel(f"{where}: torch.fx cannot trace {type(model).__name__}: {cause}; {way}")
