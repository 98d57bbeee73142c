"""Milliseconds of a layer at any widths, for the search: a coarse grid from the latency model, interpolated. It decides nothing.

The latency model measures whatever width it is asked for; a search asks for thousands. So each layer is measured on a grid of
widths (multiples of 8, a handful between the narrowest and the whole) before the search, in one go, and a policy's widths are
interpolated. What that leaves out is caught by the verification of whole networks.
"""

import itertools
import json
from bisect import bisect_right
from collections.abc import Sequence

from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.listed import trace
from rmprune.measure.latency_model import LatencyModel
from rmprune.measure.layers import TimedLayer, network_layers
from rmprune.pruning.groups import Structure
from rmprune.pruning.layers import SizedLayer

GRID = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Fractions of a layer's width near which it is measured,"""
COARSE, BROAD = (0.0, 0.25, 1.0), 64
"""of one wider than BROAD: there steps of 8 and 16 channels, which kernels like or do not, matter less."""


def grid_widths(whole: int, prunable: bool) -> list[int]:
    """Widths at which a layer of this width is measured, ascending; the last one is `whole`."""
    if not prunable:
        return [whole]
    step = 8 if whole <= 128 else 16 if whole <= 256 else 32
    grid = GRID if whole <= BROAD else COARSE
    points = {max(step, round(fraction * whole / step) * step) for fraction in grid[1:-1]}
    return sorted({point for point in points if point < whole} | {min(8, whole), whole})


class TimeCost:
    """A `Cost` in milliseconds. `constant`: what the whole network takes besides its convolutions and linear layers.

    Made for one network; measures its grid at once, through the latency model (and so into its cache).
    """

    def __init__(self, table: LatencyModel, model: nn.Module, structure: Structure, example_inputs: Tensor) -> None:
        sized = [layer for layer in structure.layers if layer.kind != "rest"]
        for layer in sized:
            _refuse_untimed(layer, model.get_submodule(layer.name))
        found = network_layers(model, example_inputs)
        self.table = table
        self.timed = timed_layers(model, found)
        self.grids = {layer.name: _grid(layer) for layer in sized}
        shapes = [
            self.timed[name]._replace(cin=cin, cout=cout)
            for name, (into, out) in self.grids.items()
            for cin, cout in ([(w, w) for w in out] if into is out else itertools.product(into, out))
        ]
        table.require([*shapes, *found])
        others = [layer for layer in found if layer not in set(self.timed.values())]
        self._scale, self._each = table.fit
        self.constant = (table.overhead or 0.0) + sum(self._scale * table.layer_ms(x) + self._each for x in others)

    def __call__(self, layer: SizedLayer, cin: int, cout: int) -> float:
        if layer.kind == "rest":
            return 0.0  # among `constant`
        into, out = self.grids[layer.name]
        timed = self.timed[layer.name]
        total = 0.0
        for b, v in _between(out, cout):
            for a, u in [(b, 1.0)] if into is out else _between(into, cin):
                total += u * v * self.table.layer_ms(timed._replace(cin=a, cout=b))
        return self._scale * total + self._each


def _refuse_untimed(layer: SizedLayer, module: nn.Module) -> None:
    tokens = layer.kind == "linear" and layer.output_size != (1, 1)
    filters = layer.kind == "depthwise" and layer.cin != layer.cout
    if tokens or filters or not isinstance(module, nn.Conv2d | nn.Linear):
        what = "on tokens" if tokens else "with several filters a channel" if filters else "layers"
        raise UnsupportedModel(
            f"{layer.name}: {type(module).__name__} {what} cannot be timed one by one; divide measured time up by MACs (cost='macs')"
        )


def timed_layers(model: nn.Module, found: Sequence[TimedLayer]) -> dict[str, TimedLayer]:
    """{name: its layer in `found`, the network_layers of this network} of convolutions and linear layers.

    Raises UnsupportedModel for a network whose layers cannot be told apart.
    """
    weighted = [layer for layer in found if json.loads(layer.kind)["type"] in ("Conv2d", "Linear")]
    called = [str(node.target) for node in trace(model).nodes if node.op == "call_module"]
    names = [name for name in called if isinstance(model.get_submodule(name), nn.Conv2d | nn.Linear)]
    if len(names) != len(weighted):
        raise UnsupportedModel(f"{len(names)} layers run, {len(weighted)} can be timed; use another constraint")
    return dict(zip(names, weighted, strict=True))


def _grid(layer: SizedLayer) -> tuple[list[int], list[int]]:
    """(input widths, output widths); one and the same list for a depthwise layer. Of grouped ones multiples of their groups."""
    out = grid_widths(layer.cout, bool(layer.outputs))
    if layer.kind == "depthwise":
        return out, out
    into = grid_widths(layer.cin, bool(layer.inputs))
    return _divided(into, layer.groups), _divided(out, layer.groups)


def _divided(widths: list[int], groups: int) -> list[int]:
    return sorted({max(1, width // groups) * groups for width in widths})


def _between(grid: list[int], width: int) -> list[tuple[int, float]]:
    """Grid points around a width and their weights; beyond the ends the end."""
    at = bisect_right(grid, width)
    if at == 0 or at == len(grid):
        return [(grid[0] if at == 0 else grid[-1], 1.0)]
    low, high = grid[at - 1], grid[at]
    share = (width - low) / (high - low)
    return [(low, 1 - share), (high, share)] if share else [(low, 1.0)]
