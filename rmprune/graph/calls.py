"""What a call in a graph is, however it is written: as a function, a method or an operator, its arguments by place or by name."""

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
SUBTRACTIONS = (
    operator.sub, operator.isub, torch.sub, torch.subtract, torch.rsub, "sub", "sub_", "subtract", "subtract_",
)  # fmt: skip
MULTIPLICATIONS = (
    operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "multiply_",
)  # fmt: skip
DIVISIONS = (
    operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide,
    "div", "div_", "divide", "divide_", "true_divide", "true_divide_",
)  # fmt: skip
_IN_PLACE = (
    "iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod", "iand", "ior", "ixor", "ilshift", "irshift",
)  # fmt: skip
IN_PLACE_OPERATORS = {name: getattr(operator, name) for name in _IN_PLACE}
"""The operators that change their first argument (`y += z`)."""
DROPOUT_CALLS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
TORCH_DROPOUT_CALLS = (torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout)
"""Of dropout as a function; those of torch call their flag `train` and have no default for it."""
CONCATENATIONS = (torch.cat, torch.concat)
CHUNKS, SPLITS = ("chunk", torch.chunk), ("split", torch.split)
_SIZE_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "stride")


def set_item(x: Any, index: Any, value: Any) -> Any:
    """x[index] = value, in place, as a call that gives x."""
    x[index] = value
    return x


_OWN_NAMES = {"axis": "dim", "keepdims": "keepdim", "x2": "other"}
_LEADING = {
    "scaled_dot_product_attention": ("query", "key", "value"),
    "where": ("condition", "input"),
    "searchsorted": (),
}


def name_as_torch(node: fx.Node) -> None:
    """What a call of torch's is given by numpy's names gets torch's own, what leads by name its place: mean(input=x, axis=1), in place."""
    name = str(getattr(node.target, "__name__", node.target))
    stock = node.op == "call_function" and any(getattr(m, name, None) is node.target for m in (torch, F))
    if not node.kwargs or "quant" in name or not (stock or node.op == "call_method"):  # some of these have an `axis`
        return
    args, given = list(node.args), {_OWN_NAMES.get(key, key): value for key, value in node.kwargs.items()}
    if not args and name not in _LEADING:
        args += [given.pop(first) for first in ("input", "x", "a", "x1") if first in given]
    for leading in _LEADING.get(name, ())[len(args) :]:
        if leading not in given:
            break
        args.append(given.pop(leading))
    node.args, node.kwargs = tuple(args), given


def argument(node: fx.Node, place: int, *names: str, default: Any = None) -> Any:
    """The argument of a call at this place, or by one of these names."""
    if len(node.args) > place:
        return node.args[place]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def is_addition(node: fx.Node) -> bool:
    """Whether a call adds."""
    return node.op in ("call_function", "call_method") and node.target in ADDITIONS


def is_sum(node: fx.Node) -> bool:
    """Whether a call adds or subtracts."""
    return node.op in ("call_function", "call_method") and node.target in (*ADDITIONS, *SUBTRACTIONS)


def arguments(node: fx.Node) -> dict[str, Any]:
    """By name, defaults filled in; calls without a Python signature (torch.dropout) name their last flag `train`."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        flags = [value for value in node.args if isinstance(value, bool)]
        return {"p": next(iter(node.args[1:2]), 1), "training": flags[-1] if flags else True, **node.kwargs}
    bound.apply_defaults()
    return bound.arguments


def writes(node: fx.Node) -> bool:
    """Whether a function or method writes over its first argument: y += z, y.relu_(), F.relu(y, True), y[0] = z."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    keyword = node.target in (operator.and_, operator.or_)  # named so since Python has words of these names
    if name.endswith("_") and name[0] != "_" and not keyword:
        return name != "requires_grad_"
    flag = node.kwargs.get("inplace") or (True in node.args[1:] and arguments(node).get("inplace"))
    return bool(flag) or node.target is set_item or node.target in IN_PLACE_OPERATORS.values()


def concatenated(node: fx.Node) -> tuple[list[Any], Any]:
    """What a call concatenates, and along which dimension; nothing where it is no concatenation."""
    if node.op != "call_function" or node.target not in CONCATENATIONS:
        return [], None
    parts = argument(node, 0, "tensors")
    return list(parts) if isinstance(parts, list | tuple) else [], argument(node, 1, "dim", default=0)


def piece_sizes(node: fx.Node) -> Any:
    """What a chunk or a split says of its pieces: how many there are (chunk), how long each is, or their lengths; None elsewhere."""
    cuts = node.target in CHUNKS or node.target in SPLITS
    return argument(node, 1, "chunks", "split_size", "split_size_or_sections") if cuts else None


def is_size(node: fx.Node) -> bool:
    """Whether a node is a shape or a number and no tensor: x.shape, x.size(0), an entry of a shape, arithmetic on these."""
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    arithmetic = getattr(node.target, "__module__", None) in ("_operator", "math")
    return arithmetic and bool(node.all_input_nodes) and all(is_size(source) for source in node.all_input_nodes)


def module_around(node: fx.Node) -> tuple[str, Any]:
    """Path and class of the module in whose code a call stands; ("", None) where that is the network's own, or not known."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1] if stack else ("", None)


def own_size(value: Any) -> tuple[Any, Any]:
    """The node whose sizes this is, and which of them; None for all."""
    if not isinstance(value, fx.Node):
        return None, None
    if value.target == "size" or (value.target is getattr and value.args[1] == "shape"):
        return value.args[0], value.args[1] if value.target == "size" and len(value.args) > 1 else None
    if value.target is operator.getitem and isinstance(value.args[0], fx.Node):
        source, which = own_size(value.args[0])
        return (source, value.args[1]) if which is None else (None, None)
    return None, None
