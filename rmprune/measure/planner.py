"""Memory of activations on paper: when each tensor of a network lives, and how few bytes hold them all. What a process really
takes is memory.py's business.

As runtimes do it: batch norms folded; activations and additions write over an input that nobody reads any more; reshaping,
flattening and dropout hold nothing of their own; a convolution, pooling, concatenation, split or slice writes to a tensor of its own
(or to several) while its inputs live. A layer's addition and activation may be fused into it: that changes no number here, as both
would have written over its output.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils._pytree import tree_leaves

from rmprune.graph.calls import DROPOUT_CALLS
from rmprune.graph.fold import fold_batch_norms
from rmprune.graph.listed import shaped
from rmprune.graph.network import GONE
from rmprune.graph.vocabulary import FUNCTION_NAMES

ALIGNMENT = 64  # bytes at which runtimes begin a tensor
_ALIASES = (*GONE, "Flatten", "Unflatten")
_ALIAS_CALLS = (
    "flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze", "stochastic_depth", "detach",
    *(call.__name__ for call in DROPOUT_CALLS),
)  # fmt: skip
_POINTWISE = {
    "add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "neg", "maximum", "minimum", "clamp", "relu", "relu6", "prelu",
    "leaky_relu", "hardtanh", "hardsigmoid", "hardswish", "sigmoid", "tanh", "silu", "gelu", "elu", "mish",
}  # fmt: skip
_POINTWISE_MODULES = ("BatchNorm2d", "PReLU", "Softplus", "Threshold")


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of the tensors between layers, for one forward pass over the whole batch, input and output included."""

    peak_bytes: int
    """Most bytes that live at one time: no runtime that computes in this order needs less."""
    arena_bytes: int
    """Length of one block that holds every tensor at a fixed place (greedy, the largest first), as runtimes for small devices plan it."""
    parameter_bytes: int
    at: str
    """The step at which most bytes live."""
    live: tuple[tuple[str, int], ...]
    """The tensors that live then, by the step that made each, in bytes."""


@dataclass
class _Buffer:
    """A piece of memory, from the step that first writes it to the last that reads it."""

    name: str
    size: int
    first: int
    last: int


def activation_memory(model: nn.Module, example_inputs: Tensor, *, bytes_per_value: int = 4) -> ActivationMemory:
    """Peak memory of activations in eval mode for the batch `example_inputs` (N, C, H, W), and memory of the parameters.

    `bytes_per_value`: 4 for float32, 2 for float16 and bfloat16, 1 for int8. Nothing is computed. Exact removal of residuals
    does not lower the peak: what the shortcut held, the copies hold. Raises UnsupportedModel where torch.fx cannot trace the network.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    >>> rmprune.measure.activation_memory(net, torch.randn(1, 3, 10, 10)).peak_bytes  # 8 and 4 channels at the second layer
    4800
    """
    folded = fold_batch_norms(model, (example_inputs,))
    names, buffers = _planned(folded, example_inputs, bytes_per_value)
    totals = _totals(names, buffers)
    step = max(range(len(names)), key=totals.__getitem__)
    return ActivationMemory(
        peak_bytes=totals[step],
        arena_bytes=_arena(buffers),
        parameter_bytes=sum(p.numel() for p in folded.parameters()) * bytes_per_value,
        at=names[step],
        live=tuple((b.name, b.size) for b in buffers if b.first <= step <= b.last),
    )


def live_bytes(model: nn.Module, example_inputs: Tensor) -> list[int]:
    """Bytes of float32 that live at each step of the network as it stands, batch norms and all (which write over what they read)."""
    return _totals(*_planned(model, example_inputs, 4))


def _planned(model: nn.Module, example_inputs: Tensor, bytes_per_value: int) -> tuple[list[str], list[_Buffer]]:
    """The steps of a network, and the pieces of memory that they write and read."""
    module = shaped(model, example_inputs)
    return [node.name for node in module.graph.nodes], _buffers(module, bytes_per_value)


def _totals(names: list[str], buffers: list[_Buffer]) -> list[int]:
    return [sum(b.size for b in buffers if b.first <= step <= b.last) for step in range(len(names))]


def _buffers(module: fx.GraphModule, bytes_per_value: int) -> list[_Buffer]:
    """Pieces of memory in the order of their making; nodes that share one (aliases, in-place steps) are one buffer."""
    nodes = list(module.graph.nodes)
    step = {node: number for number, node in enumerate(nodes)}
    modules = dict(module.named_modules())
    read: dict[fx.Node, int] = {}  # the last step that reads a node's value, through aliases
    for node in reversed(nodes):
        own = (read[user] if _is_alias(user, modules) else step[user] for user in node.users)
        read[node] = max(own, default=step[node])
    holds: dict[fx.Node, _Buffer] = {}
    buffers: list[_Buffer] = []
    for node in nodes:
        size = _size(node) * bytes_per_value
        if node.op == "output" or node.op == "get_attr" or not size:
            continue
        sources = [source for source in node.all_input_nodes if source in holds]
        if sources and _is_alias(node, modules):
            holds[node] = holds[sources[0]]
        else:
            free = (s for s in sources if holds[s].last == step[node] and _size(s) * bytes_per_value == size)
            reused = next(free, None) if _is_pointwise(node, modules) else None
            if reused is None:
                buffers.append(_Buffer(node.name, size, step[node], step[node]))
            holds[node] = buffers[-1] if reused is None else holds[reused]
        holds[node].last = max(holds[node].last, read[node])
    return buffers


def _size(node: fx.Node) -> int:
    """Values that a node's tensor holds, or its tensors together (of a chunk, a recurrent layer); 0 where there is none."""
    return sum(int(torch.Size(meta.shape).numel()) for meta in _tensors(node))


def _tensors(node: fx.Node) -> list[TensorMetadata]:
    held = tree_leaves(node.meta.get("tensor_meta"), is_leaf=lambda value: isinstance(value, TensorMetadata))
    return [meta for meta in held if isinstance(meta, TensorMetadata)]


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """(class of a module, plain name of a function or method); one of them is empty."""
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__, ""
    target: Any = node.target
    known = str(FUNCTION_NAMES.get(target) or getattr(target, "__name__", target))
    return "", known.rpartition(".")[2].rstrip("_")


def _is_alias(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    kind, name = _called(node, modules)
    if node.target is operator.getitem and isinstance(source := node.args[0], fx.Node):
        return not isinstance(source.meta.get("tensor_meta"), TensorMetadata)  # one of several tensors
    return kind in _ALIASES or (node.op in ("call_function", "call_method") and name in _ALIAS_CALLS)


def _is_pointwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    kind, name = _called(node, modules)
    if kind:
        module = modules[str(node.target)]
        activation = type(module).__module__ == "torch.nn.modules.activation" and kind != "MultiheadAttention"
        return kind in _POINTWISE_MODULES or activation
    return node.op != "placeholder" and name in _POINTWISE


def _arena(buffers: list[_Buffer]) -> int:
    """Length of the block when each buffer, the largest first, is laid at the lowest place that is free all its life
    (greedy by size: Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020).
    """
    laid: list[tuple[int, _Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.first)):
        place = 0
        for start, other in sorted(laid, key=lambda item: item[0]):
            meets = other.first <= buffer.last and buffer.first <= other.last
            if meets and start < place + buffer.size and place < start + other.size:
                place = -(-(start + other.size) // ALIGNMENT) * ALIGNMENT
        laid.append((place, buffer))
    return max((place + buffer.size for place, buffer in laid), default=0)
