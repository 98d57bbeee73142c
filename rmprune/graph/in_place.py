"""In-place calls in a traced graph: later readers of a changed value are given the new one. torch.fx alone does not know."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.calls import DROPOUT_CALLS, TORCH_DROPOUT_CALLS, set_item, writes
from rmprune.graph.network import GONE, named
from rmprune.graph.run import node_value

# Names of functions and methods; of some it depends on the value whether they share its memory.
_SAME = (
    "contiguous", "detach", "float", "double", "to", "type_as", "cpu", "requires_grad_", "pos", "positive", "stochastic_depth",
    *(call.__name__ for call in (*DROPOUT_CALLS, *TORCH_DROPOUT_CALLS)),
)  # fmt: skip
_VIEWS = (
    "getitem", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "transpose", "permute", "t", "adjoint",
    "swapaxes", "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "narrow", "select",
    "unbind", "diagonal", "unfold", "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit",
)  # fmt: skip
_VIEW_ATTRIBUTES = ("T", "mT", "H", "mH", "data", "real")


def undo_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """After `x += y` or relu_(x), later readers of x, or of another name for x, see the new value: they are given it.

    Raises UnsupportedModel where a later reader sees the change through a view of another shape.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    same: dict[fx.Node, fx.Node] = {}  # the first name of a value
    storage: dict[fx.Node, fx.Node] = {}  # the first node that shares its memory
    sharing: dict[fx.Node, list[fx.Node]] = {}  # and all that do
    for node in list(graph.nodes):
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        alias = _alias(node, modules)
        same[node] = same[source] if source is not None and alias == "same" else node
        changes = source is not None and changes_in_place(node, modules)
        storage[node] = storage[source] if source is not None and (alias or changes) else node
        sharing.setdefault(storage[node], []).append(node)
        if source is None or not changes:
            continue
        for other in [n for n in sharing[storage[source]] if n is not node]:
            later = [user for user in other.users if order[user] > order[node]]
            first = min(later, key=order.__getitem__, default=node)
            written = source.target is operator.getitem and first.args == (other, source.args[1], node)
            if written and first.target is set_item:
                continue  # y[:, 8:] *= 2, whose last step puts the view's new values where they are
            if later and same[other] is not same[source]:
                raise UnsupportedModel(
                    f"{node.name} changes {other.name} in place through a view; write it out of place"
                )
            for user in later:
                user.replace_input_with(other, node)


def changes_in_place(node: fx.Node, modules: Mapping[str, Any]) -> bool:
    """Whether a node writes its value over its first argument."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False)) and not named(modules[str(node.target)], GONE)
    return writes(node)


def value_apart(
    node: fx.Node, value: Callable[[fx.Node], Any], own: Callable[[fx.Node], Any], modules: Mapping[str, Any]
) -> Any:
    """`node_value` where in-place calls were undone: what the node would write over may be read by others, and stays as it is."""
    over = node.args[0] if changes_in_place(node, modules) else None

    def apart(source: fx.Node) -> Any:
        found = value(source)
        return found.clone() if source is over and isinstance(found, Tensor) else found

    return node_value(node, apart, own)


def _alias(node: fx.Node, modules: Mapping[str, Any]) -> str:
    """ "same" where the node is another name for its first argument, "view" where it shares its memory in another shape."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if named(module, GONE):
            return "same"
        return "view" if isinstance(module, nn.Flatten | nn.Unflatten) else ""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in _SAME:
        return "same"
    return "view" if name in _VIEWS or (name == "getattr" and node.args[1] in _VIEW_ATTRIBUTES) else ""
