"""Sizes that code writes down (`reshape(B, N, 3, heads, 64)`, `split([8, 16], 1)`, the scale of attention): where they stand in a graph,
and the network as one, so that a cut can write others. Decides nothing.

A place is "NODE:1.2", the third entry of the second argument of the node, or "NODE:scale".
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.names import spell
from rmprune.graph.normalise import PlainTracer
from rmprune.graph.run import evaluating, on_copies
from rmprune.graph.tensors import tensors_in
from rmprune.graph.tracing import follow

RETRACINGS = 3  # of tracing what was traced, until its names are those that tracing gives


def as_graph(model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule | None:
    """The same network as a torch.fx graph in eval mode, whose layers (shared with it) have the names they had; None where that is not
    the same for one example more, or less: where code asks for the size of the batch.
    """
    flat: nn.Module = model
    with evaluating(model):
        try:
            for _ in range(RETRACINGS):
                before = [node.name for node in flat.graph.nodes] if isinstance(flat, fx.GraphModule) else None
                graph = follow(PlainTracer, flat, inputs).graph
                spell(graph)
                flat = fx.GraphModule(flat, graph, type(model).__name__)
                if before == [node.name for node in graph.nodes]:
                    break
            with torch.no_grad():
                for x in (inputs, tuple(torch.cat([x, x[:1]]) for x in inputs)):
                    pairs = zip(tensors_in(on_copies(flat, *x)), tensors_in(on_copies(model, *x)), strict=True)
                    if not all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in pairs):
                        return None
        except (UnsupportedModel, RuntimeError, ValueError, TypeError):
            return None
    flat.training = model.training
    assert isinstance(flat, fx.GraphModule)
    return flat


def places(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All numbers and nodes in the arguments of a node, each with its path: "1.2"."""
    if isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from places(part, f"{path}.{i}".lstrip("."))
    elif isinstance(value, slice):
        for end in ("start", "stop"):
            yield from places(getattr(value, end), f"{path}.{end}")
    elif isinstance(value, fx.Node) or type(value) is int:
        yield path, value


def put(value: Any, path: str, number: Any) -> Any:
    """Arguments with `number` at this path."""
    step, _, rest = path.partition(".")
    if not step:
        return number
    if isinstance(value, slice):
        ends = {end: getattr(value, end) for end in ("start", "stop", "step")} | {step: number}
        return slice(ends["start"], ends["stop"], ends["step"])
    parts = list(value)
    parts[int(step)] = put(parts[int(step)], rest, number)
    return tuple(parts) if isinstance(value, tuple) else parts


def write(graph: fx.Graph, sizes: dict[str, Tensor]) -> None:
    """Writes at each place how many of the channels counted there stay (bool mask), in place."""
    nodes = {node.name: node for node in graph.nodes}
    for place, mask in sizes.items():
        name, _, path = place.partition(":")
        node = nodes[name]
        if path == "scale":
            if node.kwargs.get("scale") is None:  # what the whole width gave
                node.kwargs = {**node.kwargs, "scale": mask.numel() ** -0.5}
        elif not bool(mask.all()):
            node.args = put(node.args, path, int(mask.sum()))


def agree(graph: fx.Graph, with_it: fx.Graph) -> None:
    """Writes the numbers of one graph into another that was read from it, or from that of the same network at another width, in place."""
    own = {node.name: node for node in with_it.nodes}
    read = {node.meta["traced_as"]: node for node in graph.nodes if "traced_as" in node.meta}
    for name, node in read.items():
        if node.op not in ("call_function", "call_method") or name not in own or own[name].target != node.target:
            continue
        known = dict(places(node.args))
        for path, value in places(own[name].args):
            number = read.get(value.name, known.get(path)) if isinstance(value, fx.Node) else value
            if path in known and known[path] is not number:
                node.args = put(node.args, path, number)
