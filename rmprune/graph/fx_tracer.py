"""torch.fx's tracer, helped by the sizes of the example inputs where it cannot go on, and the refusal where that is no help either."""

import contextlib
import itertools
import linecache
import operator
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import Attribute, TraceError
from torch.utils._pytree import tree_leaves

from rmprune.graph.calls import CHUNKS, IN_PLACE_OPERATORS, piece_sizes, set_item
from rmprune.graph.run import node_value
from rmprune.graph.shapes import WithoutValues, blank, blank_inputs, to_run
from rmprune.graph.tensors import floating_dtype

_SIZES = ("shape", "size", "numel", "nelement", "stride")
_DETACHES = ("detach", torch.detach)  # detach_ stays in the graph
_PLACES = ("device", "is_cuda", "is_cpu", "is_meta")
_OURS, _TORCH = Path(__file__).parents[1], Path(torch.__file__).parent


def _is_network(file: str) -> bool:
    """Whether a file is of the code that is traced: a network of ours, or anyone's but torch's."""
    parents = Path(file).parents
    return file[:1] != "<" and _TORCH not in parents and (_OURS not in parents or _OURS / "models" in parents)


class Tracer(fx.Tracer):
    """fx's tracer. With `inputs` it runs the network without values on the way, so that sizes and numbers made of them decide.

    decided: the places where sizes did; what is traced then holds for these sizes only. autocast: where the code enters it. frozen: where
    it stops gradients (no_grad and its kin, detach) of what is trained.
    """

    inputs: tuple[Tensor, ...] | None = None
    held = False  # whether tensors that modules hold beside their parameters are read in the graph, too
    whole = False  # whether modules of torch that are made of layers are one layer each
    aside = False  # while a node is run for its value, and what modules do then is not recorded

    def __init__(self) -> None:
        super().__init__()
        self.decided: dict[str, None] = {}
        self.autocast: dict[str, None] = {}
        self.frozen: dict[str, None] = {}
        self.without: str | None = None  # where gradients were switched off, if the last node was made without them
        self.parameters: set[str] = set()  # their names, and those of all modules around them
        self.learned: set[fx.Node] = set()  # tensors that depend on them
        self.values: dict[fx.Node, Any] = {}
        self.sized: set[fx.Node] = set()

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        for name, _ in root.named_parameters(remove_duplicate=False):
            self.parameters.update(itertools.accumulate(name.split("."), "{}.{}".format))
        with _near_patches(list(root.modules())), torch.enable_grad():  # so that only the code itself switches them off
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Known(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs) if self.aside else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        found = attr_val if self.aside else super().getattr(attr, attr_val, parameter_proxy_cache)
        if self.aside or not self.held or not isinstance(found, Tensor):
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
        if torch.is_grad_enabled():
            self.without = None
        elif self.without is None:
            self.without = self.place() or node.name
        if self._learns(node):
            self.learned.add(node)
            if self.without or node.target in _DETACHES:
                self.frozen[self.without or self.place() or node.name] = None
        if self.inputs is not None and kind != "output":
            self._know(node)
        return node

    def _learns(self, node: fx.Node) -> bool:
        """Whether a node gives a tensor that depends on a parameter, frozen or not."""
        own = node.op in ("call_module", "get_attr") and str(node.target) in self.parameters
        of_sizes = node.target in _SIZES or (node.target is getattr and node.args[1] != "T")
        return own or (not of_sizes and any(source in self.learned for source in node.all_input_nodes))

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
                self.aside = True
                with WithoutValues():
                    self.values[node] = node_value(node, self.values.__getitem__, self._own)
        except Exception:  # the user's own function, or an operator without a rule for shapes
            return
        finally:
            self.aside = False
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
        stack = traceback.extract_tb(error.__traceback__) if error is not None else traceback.extract_stack()
        begun = [place for place, frame in enumerate(stack) if frame.filename == __file__ and frame.name == "trace"]
        frames = stack[begun[-1] if begun else 0 :]
        module = list(self.module_stack.values())[-1:] or [("", type(self.root))]
        path, kind = module[0]
        name = getattr(kind, "__name__", str(kind).rsplit(".", 1)[-1])
        said = [f"{path} ({name})" if path else name]
        for frame in [frame for frame in frames if _is_network(frame.filename)][-1:]:
            line = linecache.getline(frame.filename, frame.lineno or 0).strip()
            said.append(f"{Path(frame.filename).name} line {frame.lineno}" + (f", `{line[:80]}`" if line else ""))
        return ", ".join(said)


_UNKNOWN = object()
NO_LENGTH = "the length of this value is not known while the network is traced"


@contextlib.contextmanager
def _near_patches(modules: list[nn.Module]) -> Iterator[None]:
    """fx puts its lookup of parameters on the classes of the network's modules, and its call on what nn.Module's own calls.

    On nn.Module's `__getattr__` and `__call__`, Python would go through all its subclasses, more than a thousand, which takes longer
    than a small network's whole trace.
    """
    own, call = _symbolic_trace._Patcher, nn.Module._call_impl
    kinds = {type(module) for module in modules}
    stock = nn.Module.__getattr__
    near = not any("__getattr__" in vars(kind) or kind.__getattr__ is not stock for kind in kinds)
    below = all(kind._call_impl is call for kind in kinds) and not any(m._compiled_call_impl for m in modules)

    class Near(own):  # type: ignore[misc, valid-type]
        def patch_method(self, cls: type, name: str, new_fn: Any, deduplicate: bool = True) -> None:
            if cls is nn.Module and name == "__getattr__" and near:
                for kind in kinds:
                    self.patches_made.append(_OwnLookup(kind, name, None, new_fn))
                    self.patches_made[-1].patch()
            else:
                name = "_call_impl" if cls is nn.Module and name == "__call__" and below else name
                super().patch_method(cls, name, new_fn, deduplicate)

    orig = _symbolic_trace._orig_module_call
    _symbolic_trace._Patcher = Near  # type: ignore[misc]
    _symbolic_trace._orig_module_call = call if below else orig
    try:
        yield
    finally:
        _symbolic_trace._Patcher, _symbolic_trace._orig_module_call = own, orig  # type: ignore[misc]


class _OwnLookup(_symbolic_trace._PatchedFnSetAttr):
    def revert(self) -> None:
        delattr(self.frame_dict, self.fn_name)


class _Known(fx.Proxy):
    """A proxy that Python may ask for its length, or for its number where it is one made of sizes."""

    def __getattr__(self, name: str) -> Any:
        return _KnownAttribute(self, name)

    def __len__(self) -> int:
        count = length(self.tracer, self)  # type: ignore[arg-type]
        if count is None:
            raise TypeError(NO_LENGTH)  # `list` asks for it, goes on where there is none, and asks for the entries
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
