"""Intervals that hold for every input, channel by channel (RM.md 2), through a normalised graph. Each node is visited once.

`node.meta["range"]` is (low, high), two float64 tensors with one entry a channel, for every node whose shape is known.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmprune.graph.activations import image
from rmprune.graph.calls import ADDITIONS, CONCATENATIONS, MULTIPLICATIONS, concatenated
from rmprune.graph.convolution import Conv, Geometry, from_module, norm_of, pointwise
from rmprune.graph.network import Network, NodeLayer, is_batch_norm, shape_of
from rmprune.graph.obstacle import or_none
from rmprune.graph.run import run

Range = tuple[Tensor, Tensor]
_ROUNDING = 1e-12  # outward, relative: the rounding of the interval sums themselves


def range_of(node: fx.Node) -> Range:
    """The bounds of what a node gives: (low, high), float64 [channels] each."""
    found: Range = node.meta["range"]
    return found


def unbounded(channels: int) -> Range:
    """Bounds that say nothing: (-inf, inf), float64 [channels] each."""
    end = torch.full((channels,), math.inf, dtype=torch.float64)
    return -end, end


def annotate_ranges(
    network: Network, input_range: tuple[float, float] = (-math.inf, math.inf), rounding: float = _ROUNDING
) -> None:
    """Sets node.meta["range"] in one forward sweep. `input_range` bounds every element of every input.

    `rounding`: how far ends are moved outward, relative; with 0 the ends of a constant are one and the same number.
    """
    for node in network.graph.nodes:
        annotate_range(network, node, input_range, rounding)


def annotate_range(
    network: Network,
    node: fx.Node,
    input_range: tuple[float, float] = (-math.inf, math.inf),
    rounding: float = _ROUNDING,
) -> None:
    """Sets node.meta["range"] from the ranges of what the node reads, where it has a shape (N, C, ...)."""
    shape = shape_of(node)
    if shape is None or len(shape) < 2:
        return
    if node.op == "placeholder":
        ends = torch.ones(shape[1], dtype=torch.float64)
        found: Range | None = (ends * input_range[0], ends * input_range[1])
    else:
        found = _propagate(network, node)
    low, high = unbounded(shape[1]) if found is None or len(found[0]) != shape[1] else found
    node.meta["range"] = _outward(low, -rounding, -math.inf), _outward(high, rounding, math.inf)


def _outward(end: Tensor, by: float, unknown: float) -> Tensor:
    """One end (C,) moved outward. Exact zeros stay: sums of non-negative terms do not round below zero."""
    moved = end + by * end.abs() if by else end
    return torch.nan_to_num(moved, nan=unknown, posinf=math.inf, neginf=-math.inf)


def _propagate(network: Network, node: fx.Node) -> Range | None:
    """(low, high), (C,) each, of what the node makes of its sources' ranges; None where nothing is known."""
    inputs = [n for n in node.all_input_nodes if "range" in n.meta]
    if len(inputs) != len(node.all_input_nodes) or not inputs:
        return None
    if node.op == "call_module" and len(inputs) == 1:
        layer = network.layer(node)
        if isinstance(layer, _READS_MAPS) and len(shape_of(inputs[0]) or ()) != 4:
            return None  # an image without its batch: dimension 1 is its height
        return _through_layer(layer, inputs[0], node)
    if node.op in ("call_function", "call_method") and node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target](node)
    return None


_READS_MAPS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)


def _through_layer(layer: NodeLayer | None, source: fx.Node, node: fx.Node) -> Range | None:
    low, high = range_of(source)
    if isinstance(layer, nn.Linear) and len(shape_of(source) or ()) == 2:
        return conv_range(pointwise(layer), low, high)
    if isinstance(layer, nn.AdaptiveAvgPool2d | nn.MaxPool2d | nn.AdaptiveMaxPool2d):
        return low, high
    if isinstance(layer, nn.Upsample):
        return None if layer.mode == "bicubic" else (low, high)  # its weights are negative in part: it overshoots
    if isinstance(layer, nn.ChannelShuffle):
        return _shuffled(low, layer.groups), _shuffled(high, layer.groups)
    if type(layer) is nn.AvgPool2d:
        return _averaged(layer, low, high)
    if is_batch_norm(layer) and (type(layer) is not nn.BatchNorm2d or layer.running_mean is not None):
        return _normalised(layer, low, high)  # type: ignore[arg-type]
    if isinstance(layer, nn.Flatten):
        before, after = shape_of(source), shape_of(node)
        if before is not None and after is not None and len(after) == 2 and layer.start_dim == 1:
            repeat = after[1] // before[1]
            return low.repeat_interleave(repeat), high.repeat_interleave(repeat)
        return None
    if isinstance(layer, nn.Module):
        found = image(layer, low, high)
        if found is not None:
            return found
        conv = or_none(from_module, layer, len(low))
        return None if conv is None else conv_range(conv, low, high)
    return None


def _averaged(pool: nn.AvgPool2d, low: Tensor, high: Tensor) -> Range:
    """Windows that reach over the border have fewer terms than they are divided by: as if zeros were averaged in."""
    fixed, padded = pool.divisor_override, pool.padding not in (0, (0, 0), [0, 0])
    if fixed is not None:
        kernel = pool.kernel_size if isinstance(pool.kernel_size, tuple | list) else [pool.kernel_size] * 2
        factor = math.prod(kernel) / fixed
        low, high = low * factor, high * factor
    fewer = padded and pool.count_include_pad if fixed is None else padded or pool.ceil_mode
    return (low.clamp(max=0), high.clamp(min=0)) if fewer else (low, high)


def _normalised(norm: _BatchNorm, low: Tensor, high: Tensor) -> Range:
    """Batch norms of vectors and volumes; without running statistics only what a scale of 0 makes constant is known."""
    if norm.running_mean is None:
        one, (low, high) = torch.ones_like(low), unbounded(len(low))
        scale = one if norm.weight is None else norm.weight.detach().double().cpu()
        shift = 0 * one if norm.bias is None else norm.bias.detach().double().cpu()
    else:
        scale, shift = norm_of(norm).scale_shift()
    ends = [torch.where(scale == 0, 0.0, scale * end) + shift for end in (low, high)]
    return torch.minimum(*ends), torch.maximum(*ends)


def _shuffled(end: Tensor, groups: int) -> Tensor:
    """One end (C,): channel g * (C / groups) + k goes to k * groups + g."""
    return end.reshape(groups, -1).T.flatten()


def conv_range(conv: Conv, low: Tensor, high: Tensor) -> Range:
    """b + sum over taps of max(w * low, w * high), where a tap that reads zero padding sees [low, high] and 0.

    low, high: (in channels,); the result (out channels,) each.
    """
    conv = conv.folded()
    weight, padded = conv.weight(), _reads_padding(conv.geometry)
    rows = conv.groups, -1, weight.shape[1]
    total_low, total_high = conv.bias.clone(), conv.bias.clone()
    for mask, bottom, top in ((~padded, low, high), (padded, low.clamp(max=0), high.clamp(min=0))):
        if not mask.any():
            continue
        taps = weight[:, :, mask]
        positive = taps.clamp(min=0).sum(-1)
        negative = taps.sum(-1) - positive  # exactly 0 where no weight is negative: the same terms in the same order
        positive, negative = positive.reshape(rows), negative.reshape(rows)
        ends = [_split(end.reshape(conv.groups, -1, 1)) for end in (bottom, top)]
        total_low += _times(positive, *ends[0]) + _times(negative, *ends[1])
        total_high += _times(positive, *ends[1]) + _times(negative, *ends[0])
    return total_low, total_high


def _split(ends: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ends (groups, in / groups, 1) with 0 in the place of infinities, and these with 0 elsewhere, where there are any."""
    infinite = torch.isinf(ends)
    return (ends.masked_fill(infinite, 0), ends.masked_fill(~infinite, 0)) if infinite.any() else (ends, None)


def _times(rows: Tensor, finite: Tensor, infinite: Tensor | None) -> Tensor:
    """Weights (groups, out / groups, in / groups) times ends, (out,), where 0 * inf = 0 and a non-zero weight makes an infinity of one."""
    total = (rows @ finite).reshape(-1)
    if infinite is None:
        return total
    products = torch.nan_to_num(rows * infinite.mT, nan=0.0, posinf=math.inf, neginf=-math.inf)
    return total + products.sum(-1).reshape(-1)


@functools.cache
def _reads_padding(geometry: Geometry) -> Tensor:
    """(kh, kw) bool: which taps read zero padding for some output pixel, on maps of some size: d t < p, or d t > d (k - 1) - p."""
    axes = []
    for k, d, p in zip(geometry.kernel, geometry.dilation, geometry.padding, strict=True):
        offset = torch.arange(k) * d
        axes.append((offset < p) | (offset > d * (k - 1) - p))
    found = axes[0][:, None] | axes[1][None]
    return found if geometry.padding_mode == "zeros" else torch.zeros_like(found)


# Each of these gives the range (C,) of a call from those of its arguments, or None where it is called in another way.


def _add(node: fx.Node) -> Range | None:
    tensors = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    numbers = [a for a in node.args[:2] if isinstance(a, int | float)]
    if len(tensors) == len(numbers) == 1 and not node.kwargs:
        low, high = range_of(tensors[0])
        return low + numbers[0], high + numbers[0]
    if len(tensors) != 2 or node.kwargs.get("alpha", 1) != 1 or shape_of(tensors[0]) != shape_of(tensors[1]):
        return None
    (low, high), (other_low, other_high) = range_of(tensors[0]), range_of(tensors[1])
    return low + other_low, high + other_high


def _cat(node: fx.Node) -> Range | None:
    parts, dim = concatenated(node)
    if dim != 1 or not parts:
        return None
    ranges = [range_of(part) for part in parts if isinstance(part, fx.Node)]
    return torch.cat([low for low, _ in ranges]), torch.cat([high for _, high in ranges])


def _multiply(node: fx.Node) -> Range | None:
    tensors = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if len(tensors) != 2 or tensors[0] is tensors[1] or len({len(shape_of(t) or ()) for t in tensors}) != 1:
        return None
    ends = [range_of(t) for t in tensors]
    if len(ends[0][0]) != len(ends[1][0]):
        return None
    products = torch.stack(
        [torch.nan_to_num(a * b, nan=0.0, posinf=math.inf, neginf=-math.inf) for a in ends[0] for b in ends[1]]
    )
    return products.amin(0), products.amax(0)


def _crop(node: fx.Node) -> Range | None:
    index: Any = node.args[1]
    plain = isinstance(index, tuple) and len(index) >= 2 and all(isinstance(i, slice) for i in index)
    if not plain or any(isinstance(end, fx.Node) for end in (index[1].start, index[1].stop, index[1].step)):
        return None
    assert isinstance(node.args[0], fx.Node)
    low, high = range_of(node.args[0])
    return low[index[1]], high[index[1]]


_FUNCTIONS: dict[object, Callable[[fx.Node], Range | None]] = {
    **dict.fromkeys(ADDITIONS, _add),
    **dict.fromkeys(CONCATENATIONS, _cat),
    **dict.fromkeys(MULTIPLICATIONS, _multiply),
    operator.getitem: _crop,
}


def observe(network: Network, inputs: tuple[Tensor, ...]) -> None:
    """Runs the network and sets node.meta["seen"] = (low, high), one entry a channel, for every map."""
    for node, value in run(network.graph, inputs, network.value):
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
            node.meta["seen"] = value.amin((0, 2, 3)), value.amax((0, 2, 3))


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


def constant(low: Tensor, high: Tensor) -> Tensor:
    """(C,) bool: which channels are one number for every input: dead ones."""
    width = high - low
    return torch.isfinite(width) & (width <= 8e-12 * torch.maximum(low.abs(), high.abs()))
