"""One convolution in the place of a residual block's branch: whether it can be, how large it is, its fit, and its place in the graph."""

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.graph.activations import rule_of
from rmprune.graph.build import build_norm
from rmprune.graph.convolution import Conv, Geometry, norm_of, output_size, to_measure, with_norm
from rmprune.graph.in_place import value_apart
from rmprune.graph.network import Network, is_batch_norm, linear_layer, shape_of
from rmprune.graph.obstacle import Obstacle
from rmprune.graph.ranges import range_of
from rmprune.graph.run import Values, run
from rmprune.pruning.layers import SizedLayer
from rmprune.pruning.positions import outputs_at, patches_at, sample_positions
from rmprune.pruning.reconstruct import POSITIONS, least_squares, reconstruct_checked
from rmprune.removal.blocks import Block, find_block
from rmprune.removal.forms import free

Layers = tuple[nn.Module, ...]
TAPS = 2**26  # numbers that the positions of one ending read, at most
INPUTS = 8192  # unknowns of a fit (channels times kernel) at most: its equations are that many squared


@dataclass(frozen=True)
class Part:
    """A block whose branch becomes one convolution, or goes."""

    block: Block
    dropped: bool = False

    @property
    def fit_shortcut(self) -> bool:
        """Whether what is fitted stands for the shortcut, too: a dropped block's one convolution."""
        if not self.dropped or len(self.block.stages) != 1 or all(n.op != "call_module" for n in self.block.way):
            return False
        conv = self.block.stages[0].conv
        mode, unknowns = conv.geometry.padding_mode, conv.in_channels * math.prod(conv.geometry.kernel)
        return conv.groups == 1 and (mode == "zeros" or not conv.geometry.padded) and unknowns <= INPUTS


@dataclass(frozen=True)
class Ending:
    """The last convolution of a block that stays, and the batch norm behind it, if there is one: what is fitted anew behind others."""

    block: Block
    conv: fx.Node
    norm: fx.Node | None

    @property
    def source(self) -> fx.Node:
        """What the convolution reads."""
        source = self.conv.args[0]
        assert isinstance(source, fx.Node)
        return source


def ending_of(network: Network, block: Block) -> Ending | None:
    """That of a block; None where a fit cannot take its place."""
    end = block.branch[-1]
    norm = end if is_batch_norm(network.layer(end)) else None
    conv = end.all_input_nodes[0] if norm is not None else end
    own = network.layer(conv)
    if not isinstance(own, nn.Conv2d) or own.padding_mode != "zeros" or isinstance(own.padding, str):
        return None
    return Ending(block, conv, norm) if own.weight[0].numel() <= INPUTS else None


def collapsible(network: Network, name: str, add: fx.Node, linear: bool = False) -> Block:
    """The block that ends in this addition. Raises Obstacle where one convolution cannot stand for its branch.

    `linear`: also where no activation follows the addition, so that the block becomes linear (inverted residuals).
    """
    block = find_block(network, name, add)
    shape = shape_of(block.fork)
    assert shape is not None
    geometry = _geometry(block)
    kernel, stride = geometry.kernel, geometry.stride
    if not all(layer.stock for layer in block.layers):
        raise Obstacle(
            "its branch holds a gate (squeeze-and-excitation) or a concatenation, which no convolution stands for"
        )
    users = [network.layer(user) for user in add.users]
    if len(block.layers) < 2:
        raise Obstacle("its branch is one layer already")
    if not linear and (
        not users or not all(isinstance(layer, nn.Module) and rule_of(layer) is not None for layer in users)
    ):
        raise Obstacle("no activation follows the addition: with one convolution the block would be linear")
    if shape[1] * kernel[0] * kernel[1] > INPUTS:
        raise Obstacle(f"its fit would have {shape[1] * kernel[0] * kernel[1]} unknowns a channel (at most {INPUTS})")
    own = shape[1] * block.layers[-1].conv.out_channels * math.prod(kernel) * math.prod(block.layers[-1].out_size)
    branch = sum(layer.conv.macs(layer.out_size) for layer in block.layers)
    if own >= branch:
        raise Obstacle(f"one {kernel[0]}x{kernel[1]} convolution would cost {own / branch:.1f} times its branch's MACs")
    if output_size(geometry, (shape[2], shape[3])) != (shape_of(add) or ())[2:]:
        raise Obstacle(f"a {kernel[0]}x{kernel[1]} convolution of stride {stride} gives another size than its branch")
    return block


def new_layers(block: Block, dropped: bool = False) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution of the size that stands for a block's branch (`dropped`: for its shortcut), and its norm; not fitted yet."""
    own = block.stages[0].conv.geometry if dropped else _geometry(block)
    out, channels = block.layers[-1].conv.out_channels, block.layers[0].conv.in_channels
    shape = (own.kernel, own.stride, own.padding, own.dilation)
    return nn.Conv2d(channels, out, *shape, bias=False), nn.BatchNorm2d(out).eval()


def _geometry(block: Block) -> Geometry:
    """That of the one convolution: the largest kernel of the branch, made odd, padded by its half, and the product of its strides."""
    kernel, stride = [1, 1], [1, 1]
    for layer in block.layers:
        for axis in (0, 1):
            kernel[axis] = max(kernel[axis], layer.conv.geometry.kernel[axis] | 1)
            stride[axis] *= layer.conv.geometry.stride[axis]
    padding = (kernel[0] // 2, kernel[1] // 2)
    return Geometry((kernel[0], kernel[1]), (stride[0], stride[1]), padding)


@dataclass(frozen=True)
class Fit:
    """One convolution and the batch norm behind it, if there is one, in eval mode (nothing: the shortcut alone), and the R2 that it gives
    of the block's sum."""

    layers: Layers
    explained: float


@dataclass(frozen=True)
class Fits:
    """The convolutions of parts, and of those endings that read what parts give, by the names of their blocks' additions."""

    fitted: dict[str, Fit]
    mended: dict[str, Layers]


@dataclass(frozen=True)
class Change:
    """What becomes of a network: parts, and endings behind them that are fitted anew, by the additions of their blocks."""

    parts: Mapping[fx.Node, Part]
    endings: Mapping[fx.Node, Ending]

    @property
    def again(self) -> dict[fx.Node, fx.Node]:
        """{addition: what is read once more when the sum is there}."""
        parts = {add: part.block.fork for add, part in self.parts.items()}
        return parts | {add: ending.source for add, ending in self.endings.items()}


def fit_in_order(network: Network, changes: Sequence[Change], inputs: tuple[Tensor, ...]) -> Iterator[tuple[int, Fits]]:
    """What each change fits, with its number, as soon as it is known.

    Runs all networks through one graph: a value is a tuple, the original's and that of each network changed so far. Up to a change's
    first part they are one, and so they are behind its last: nothing more is asked for.
    """
    found = [Fits({}, {}) for _ in changes]
    generators = [torch.Generator().manual_seed(0) for _ in changes]
    last = [max(change.again) for change in changes]

    @functools.lru_cache(maxsize=1)
    def own(node: fx.Node) -> Any:
        found = copy.deepcopy(network.own(node))
        return found.float() if isinstance(found, nn.Module) or found.is_floating_point() else found

    def side(node: fx.Node, values: Values, number: int) -> Any:
        return value_apart(node, lambda n: values[n][number], own, network.layers)

    def changed(node: fx.Node, values: Values, original: Any, number: int) -> Any:
        """The value in the network of a change; sides are counted with the original before them."""
        change, fits, side_of = changes[number], found[number], number + 1
        if node in change.parts:
            part = change.parts[node]
            read, shortcut = values[part.block.fork][side_of], values[operands(part.block)[1]][side_of]
            fits.fitted[node.name], value = _fit(part, read, original, shortcut, generators[number])
        elif all(values[source][0] is values[source][side_of] for source in node.all_input_nodes):
            value = original
        elif node in change.endings:
            ending = change.endings[node]
            read, shortcut = values[ending.source][side_of], values[operands(ending.block)[1]][side_of]
            fits.mended[node.name], value = _fit_ending(network, ending, read, original, shortcut, generators[number])
        else:
            value = side(node, values, side_of)
        return value

    @torch.no_grad()
    def sides(node: fx.Node, values: Values) -> tuple[Any, ...]:
        original = side(node, values, 0)
        return (
            original,
            *(original if last[i] < node else changed(node, values, original, i) for i in range(len(changes))),
        )

    again: dict[fx.Node, list[fx.Node]] = {}
    for change in changes:
        for add, source in change.again.items():
            again.setdefault(add, []).append(source)
    alike = tuple((x,) * (1 + len(changes)) for x in map(_ready, inputs))
    for node, _ in run(network.graph, alike, sides, again):
        yield from ((number, fits) for number, fits in enumerate(found) if last[number] is node)
        if all(end <= node for end in last):
            break


def _ready(x: Tensor) -> Tensor:
    """In float32 and, images, channels last: half of the time on CPUs."""
    x = x.float() if x.is_floating_point() else x
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _fit(part: Part, read: Tensor, total: Tensor, shortcut: Tensor, generator: torch.Generator) -> tuple[Fit, Tensor]:
    """The convolution of `read` (N, C, H, W) that comes nearest to what the shortcut leaves of the sum `total` (N, O, H', W')
    (to the sum itself where it stands for the shortcut, too; none in a dropped block besides), and what the block then gives.
    """
    variance = max(float(total.var((0, 2, 3)).sum()), 1e-30)
    if part.dropped and not part.fit_shortcut:
        return Fit((), 1 - float((total - shortcut).var((0, 2, 3)).sum()) / variance), shortcut
    conv, _ = new_layers(part.block, part.dropped)
    weight, bias, error = least_squares(conv, read, total if part.dropped else total - shortcut, generator)
    conv.weight.copy_(weight)
    measured = Conv(conv.weight.double, bias.double(), conv.in_channels, norm=to_measure(conv.out_channels))
    norm = build_norm(measured, conv(read)).float().eval()
    value = norm(conv(read)) if part.dropped else shortcut + norm(conv(read))
    return Fit((conv.eval(), norm), 1 - error / variance), value


def _fit_ending(
    network: Network, ending: Ending, read: Tensor, total: Tensor, shortcut: Tensor, generator: torch.Generator
) -> tuple[Layers, Tensor]:
    """The last convolution of a branch, of what it now reads, and its norm, so that the block's sum comes nearest to `total`, also on
    images that it is not fitted to (`reconstruct_checked`: else it stays); and that sum.
    """
    conv, folded = copy.deepcopy(network.own(ending.conv)).float(), linear_layer(network, ending.conv)
    before = None if ending.norm is None else norm_of(network.own(ending.norm))
    if before is not None:
        folded = with_norm(folded, before, "").folded()
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    layer = SizedLayer("", "conv", conv.in_channels, conv.out_channels, *shape, conv.groups, (), (), False)
    taps = conv.in_channels * math.prod(conv.kernel_size)
    samples = min(max(40_000, POSITIONS * conv.weight[0].numel()), TAPS // taps)
    at = sample_positions(len(read), (total.shape[2], total.shape[3]), -(-samples // len(read)), generator)
    wanted = outputs_at(total - shortcut, at)
    weight, bias = reconstruct_checked(folded.weight(), patches_at(read, layer, at), wanted, conv.groups)
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias.float()) if before is None else None
    value = conv(read)
    if before is None:
        return (conv.eval(),), shortcut + value
    norm = build_norm(Conv(lambda: weight, bias, conv.in_channels, norm=to_measure(len(bias), before)), value)
    norm = norm.float().eval()
    return (conv.eval(), norm), shortcut + norm(value)


def put_ending(network: Network, ending: Ending, layers: Layers) -> None:
    """The fitted layers in the place, and under the names, of those that were there; in double precision as everything there."""
    for node, layer in zip((ending.conv, ending.norm), layers, strict=False):
        assert node is not None
        network.layers[str(node.target)] = layer.double()


def operands(block: Block) -> tuple[fx.Node, fx.Node]:
    """What the addition adds: (end of the branch, end of the shortcut)."""
    first, second = block.add.args[0], block.add.args[1]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return (first, second) if first in block.branch else (second, first)


def replace_branch(network: Network, block: Block, fit: Fit, dropped: bool = False) -> None:
    """The fitted layers in the graph, in double precision as everything there, instead of the branch; or instead of the block."""
    branch, shortcut = operands(block)
    gone = block.branch
    if fit.layers:
        conv = network.insert(block.add, f"{block.name}.conv", fit.layers[0].double(), block.fork)
        norm = network.insert(block.add, f"{block.name}.bn", fit.layers[1].double(), conv)
        conv.meta["shape"] = norm.meta["shape"] = shape_of(block.add)
        if dropped:
            shortcut, gone = norm, block.nodes
        else:
            block.add.replace_input_with(branch, norm)
    if dropped:
        network.bypass(block.add, shortcut)
    for node in sorted(gone, reverse=True):
        network.take_out(node)


def without_idle_activations(network: Network, source: fx.Node) -> None:
    """Takes out activations of `source` that change none of its values."""
    for user in list(source.users):
        layer = network.layer(user)
        rule = rule_of(layer) if isinstance(layer, nn.Module) else None
        if rule is not None and not rule.slopes and bool(free(rule, *range_of(source)).all()):
            network.bypass(user, source)
