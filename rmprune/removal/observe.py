"""What example inputs show of each map: how large values are, and bounds where the user asked for calibrated ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from rmprune.removal.encode import constant
from rmprune.removal.network import Network, shape_of
from rmprune.removal.ranges import range_of


def observe(network: Network, inputs: tuple[Tensor, ...]) -> None:
    """Runs the network and sets node.meta["seen"] = (low, high), one entry a channel, for every map."""
    order = list(network.graph.nodes)
    last = {source: node for node in order for source in node.all_input_nodes}
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in order:
        if node.op == "output":
            break
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        if node.op == "placeholder":
            values[node] = next(given, node.args[0] if node.args else None)
        elif node.op == "get_attr":
            values[node] = network.constants[str(node.target)]
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            function = network.layer(node) if node.op == "call_module" else node.target
            assert callable(function)
            values[node] = function(*args, **kwargs)
        value = values[node]
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
            node.meta["seen"] = value.amin((0, 2, 3)), value.amax((0, 2, 3))
        for source in node.all_input_nodes:
            if last[source] is node:
                values.pop(source, None)


def tighten(network: Network, margin: float) -> None:
    """Cuts the ranges to what was seen, widened on each side by `margin` times the width; exact only inside.

    A channel that hardly moved on the examples is given at least the mean width of its map: it need not be dead.
    """
    for node in network.graph.nodes:
        if "seen" in node.meta and "range" in node.meta:
            low, high = node.meta["seen"]
            width = high - low
            slack = margin * torch.maximum(width, width.mean())
            bottom, top = range_of(node)
            node.meta["range"] = torch.maximum(bottom, low - slack), torch.minimum(top, high + slack)


def size_seen(node: fx.Node) -> float:
    """The largest magnitude that the examples showed in this map; infinite where nothing was observed."""
    if "seen" not in node.meta:
        return math.inf
    low, high = node.meta["seen"]
    return max(float(-low.min()), float(high.max()))


def may_shift(network: Network) -> bool:
    """Whether some map with several readers has finite negative bounds: then it matters how loose they are."""
    for node in network.graph.nodes:
        if len(node.users) > 1 and len(shape_of(node) or ()) == 4 and "range" in node.meta:
            low, high = range_of(node)
            if bool((torch.isfinite(low) & (low < 0) & ~constant(low, high)).any()):
                return True
    return False
