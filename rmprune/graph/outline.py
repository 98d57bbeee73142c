"""A network's outline for a record: its layers with their widths, and where residuals are added. Weights are not in it."""

from typing import Any

from torch import Tensor, fx, nn

from rmprune.graph.calls import is_addition
from rmprune.graph.listed import trace
from rmprune.graph.shapes import record_shapes


def outline(model: nn.Module, example_inputs: Tensor) -> dict[str, Any]:
    """JSON of the convolutions and linear layers of `model` in the order they run, for images of (N, C, H, W).

    `layers`: name, type, input and output channels (`cin`, `cout`), `kernel`, `stride`, `groups` and the output's `size`
    [H, W]. `residuals`: for every addition the positions in `layers` of the last layer before it splits (`from`, -1 for
    the input), of the last one before it is added (`to`), and of the layers on the shortcut.
    Raises UnsupportedModel where torch.fx cannot trace the network.
    """
    graph, modules = trace(model), dict(model.named_modules())
    called = {n: modules[str(n.target)] for n in graph.nodes if n.op == "call_module"}
    weighted = {n: own for n, own in called.items() if isinstance(own, nn.Conv2d | nn.Linear)}
    shapes = record_shapes(model, example_inputs, nn.Conv2d | nn.Linear)
    places = {node: place for place, node in enumerate(weighted)}
    before: dict[fx.Node, int] = {}  # the layers that a node depends on, itself included, as bits
    residuals = []
    for node in graph.nodes:
        sources = [before[source] for source in node.all_input_nodes]
        before[node] = 0
        for bits in sources:
            before[node] |= bits
        if node in places:
            before[node] |= 1 << places[node]
        elif len(sources) == 2 and is_addition(node):
            short, long = sorted(sources, key=lambda bits: (bits & ~(sources[0] & sources[1])).bit_count())
            shared = short & long
            residuals.append({"from": _last(shared), "to": _last(short | long), "shortcut": _ones(short & ~shared)})
    layers = [_layer(str(n.target), own, list(shapes[str(n.target)][1][2:])) for n, own in weighted.items()]
    return {"layers": layers, "residuals": residuals}


def _layer(name: str, own: Any, size: list[int]) -> dict[str, Any]:
    facts = {"name": name, "type": type(own).__name__, "size": size}
    if isinstance(own, nn.Linear):
        return facts | {"cin": own.in_features, "cout": own.out_features}
    widths = {"cin": own.in_channels, "cout": own.out_channels, "groups": own.groups}
    return facts | widths | {"kernel": list(own.kernel_size), "stride": list(own.stride)}


def _last(bits: int) -> int:
    return bits.bit_length() - 1


def _ones(bits: int) -> list[int]:
    return [place for place, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]
