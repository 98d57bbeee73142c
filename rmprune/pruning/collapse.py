"""Depth that a plain network does not need: the branch of a residual block becomes one convolution, fitted by least squares.

An approximation, unlike removal: the block relu(f(x) + x), f of several layers, becomes relu(w * x + x). That block RM then turns
into one plain convolution *without reserving a channel*, since branch and shortcut are linear and their kernels add up. So a network
of n blocks becomes a plain chain of n layers, half as deep as the original, whose channels are all free to be pruned. Runtimes
like it: the time of a small network goes with its number of layers more than with its MACs.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.graph.activations import rule_of
from rmprune.graph.build import build_norm, materialise, target_of
from rmprune.graph.convolution import Conv, Obstacle, to_measure
from rmprune.graph.equivalence import refuse_unseen
from rmprune.graph.foreign import reference_copy
from rmprune.graph.in_place import value_apart
from rmprune.graph.inputs import Inputs, as_given, as_names
from rmprune.graph.network import Network, shape_of
from rmprune.graph.normalise import normalise
from rmprune.graph.ranges import annotate_ranges, range_of
from rmprune.graph.run import Values, run
from rmprune.graph.shapes import to_double
from rmprune.pruning.reconstruct import least_squares
from rmprune.removal.blocks import Block, additions, find_block
from rmprune.removal.forms import free

_SEEN = 1e-10  # by how much what torch.fx read may differ from the network, relative, in float64
INPUTS = 8192  # unknowns of a fit (channels times kernel) at most: its equations are that many squared


@dataclass(frozen=True)
class Collapse:
    """What `collapse_blocks` made.

    model: eval mode, dtype, device and memory format of the original, residuals still in it.
    collapsed: {block: R2}, the part of its sum's variance on the images that one convolution and the shortcut still give.
    kept: {block: reason} of the others.
    note: what to know of it: where sizes decided what was read; empty as a rule.

    >>> model, images = rmprune.models.create("resnet8", num_classes=10, width=4).eval(), torch.randn(16, 3, 8, 8)
    >>> found = rmprune.collapse_blocks(model, images, keep=["layer3.0"])
    >>> list(found.collapsed), found.kept
    (['layer1.0', 'layer2.0'], {'layer3.0': 'asked to stay'})
    """

    model: nn.Module
    collapsed: dict[str, float]
    kept: dict[str, str]
    note: str = ""


def collapse_blocks(model: nn.Module, images: Inputs, *, keep: Iterable[str] | None = ()) -> Collapse:
    """Each residual block's branch of several layers as one convolution, with a batch norm after it. `model` is left alone.

    The kernel is the branch's largest, the stride its own; blocks that this would make dearer (bottlenecks) are kept.
    Blocks are fitted in order, each to the sum (branch and shortcut) of the original while it reads what the collapsed network
    gives it, so that later blocks make up for earlier ones.
    images: (N, C, H, W), or a tuple or dict of inputs: some hundred training images, all held in memory at once.
    `keep`: names of blocks to leave.

    Raises UnsupportedModel where torch.fx cannot follow the model or no block can be collapsed, ConfigError for an unknown block.

    >>> model, images = rmprune.models.create("resnet8", num_classes=10, width=4).eval(), torch.randn(16, 3, 8, 8)
    >>> shallow = rmprune.collapse_blocks(model, images).model
    >>> [block.reserved for block in rmprune.remove_residuals(shallow, images).blocks]  # RM then needs no channel for it
    [0, 0, 0]
    """

    def pick(network: Network, name: str, add: fx.Node) -> _Part | str:
        return "asked to stay" if name in left else _Part(collapsible(network, name, add))

    left = set(as_names(keep, "keep"))
    found = _reshaped(model, images, left, pick)
    if not found.collapsed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.kept.items())
        raise UnsupportedModel(f"no block to collapse: {reasons or 'the network has no residual'}")
    return found


def shorten_blocks(
    model: nn.Module, images: Inputs, *, collapse: Iterable[str] = (), drop: Iterable[str] = ()
) -> Collapse:
    """`collapse_blocks` for the blocks named (linear ones, too; one of one layer stays), and without the branch of those in `drop`.

    What a dropped block leaves is its shortcut: fitted to the block's sum where it is a convolution, else as it is, and without the
    activation behind it where that changes nothing. Its R2 stands among the others' in `collapsed`.
    Raises UnsupportedModel where a block cannot be had so, with the reason, ConfigError for an unknown block.
    """
    chosen = dict.fromkeys(collapse, False) | dict.fromkeys(drop, True)

    def pick(network: Network, name: str, add: fx.Node) -> _Part | str:
        if name not in chosen:
            return "asked to stay"
        try:
            block = find_block(network, name, add)
            if chosen[name]:
                return _Part(block, True)
            return _Part(collapsible(network, name, add, True)) if len(block.layers) > 1 else "one layer already"
        except Obstacle as obstacle:
            raise UnsupportedModel(f"{name}: {obstacle}") from None

    return _reshaped(model, images, set(chosen), pick)


@dataclass(frozen=True)
class _Part:
    """A block whose branch becomes one convolution, or goes."""

    block: Block
    dropped: bool = False

    @property
    def fit_shortcut(self) -> bool:
        """Whether what is fitted stands for the shortcut, too: a dropped block's one convolution."""
        way = self.block.stages
        return (
            self.dropped
            and len(way) == 1
            and any(n.op == "call_module" for n in self.block.way)
            and (way[0].conv.groups == 1 and way[0].conv.geometry.padding == (0, 0))
        )


def read_additions(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Network, list[tuple[str, fx.Node]]]:
    """The network as removal reads it, in float64 and with the range of every channel, and its additions by the names of their blocks."""
    network = normalise(reference_copy(model), tuple(to_double(x[:2]) for x in inputs))
    annotate_ranges(network)
    return network, additions(network)


def _reshaped(
    model: nn.Module, images: Inputs, named: set[str], pick: Callable[[Network, str, fx.Node], _Part | str]
) -> Collapse:
    """What `pick` says of each addition: the part that it becomes, or (also by an Obstacle) why it stays."""
    model, given = as_given(model, images)
    inputs = tuple(x.cpu() for x in given)
    network, found = read_additions(model, inputs)
    names = [name for name, _ in found]
    if named - set(names):
        raise ConfigError(f"keep: no block {', '.join(sorted(named - set(names)))}; there are: {', '.join(names)}")
    kept: dict[str, str] = {}
    parts: dict[fx.Node, _Part] = {}
    for name, add in found:
        try:
            picked = pick(network, name, add)
        except Obstacle as obstacle:
            picked = str(obstacle)
        if isinstance(picked, str):
            kept[name] = picked
        else:
            parts[add] = picked
    if not parts:
        return Collapse(model, {}, kept)
    refuse_unseen(model, inputs, _SEEN)
    fitted = _fit_in_order(network, parts, inputs)
    explained = {part.block.name: fitted[add].explained for add, part in parts.items()}
    for add, fit in reversed(fitted.items()):  # a fork is what an earlier block gives
        replace_branch(network, parts[add].block, fit, parts[add].dropped)
    result, _ = materialise(network, tuple(to_double(x[:1]) for x in inputs), 1, target_of(model), batch_norm=True)
    return Collapse(result, explained, kept, network.sizes_note)


def collapsible(network: Network, name: str, add: fx.Node, linear: bool = False) -> Block:
    """The block that ends in this addition. Raises Obstacle where one convolution cannot stand for its branch.

    `linear`: also where no activation follows the addition, so that the block becomes linear (inverted residuals).
    """
    block = find_block(network, name, add)
    shape = shape_of(block.fork)
    assert shape is not None
    kernel, stride = _geometry(block)
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
    sizes = [(n + 2 * (k // 2) - k) // s + 1 for n, k, s in zip(shape[2:], kernel, stride, strict=True)]
    if sizes != list((shape_of(add) or ())[2:]):
        raise Obstacle(f"a {kernel[0]}x{kernel[1]} convolution of stride {stride} gives another size than its branch")
    return block


def new_layers(block: Block, dropped: bool = False) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution of the size that stands for a block's branch (`dropped`: for its shortcut), and its norm; not fitted yet."""
    own = block.stages[0].conv.geometry if dropped else None
    kernel, stride = _geometry(block) if own is None else (own.kernel, own.stride)
    out, channels = block.layers[-1].conv.out_channels, block.layers[0].conv.in_channels
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(channels, out, kernel, stride, padding, bias=False), nn.BatchNorm2d(out).eval()


def _geometry(block: Block) -> tuple[tuple[int, int], tuple[int, int]]:
    """(kernel, stride) of the one convolution: the largest kernel of the branch, made odd, and the product of its strides."""
    kernel, stride = [1, 1], [1, 1]
    for layer in block.layers:
        for axis in (0, 1):
            kernel[axis] = max(kernel[axis], layer.conv.geometry.kernel[axis] | 1)
            stride[axis] *= layer.conv.geometry.stride[axis]
    return (kernel[0], kernel[1]), (stride[0], stride[1])


@dataclass(frozen=True)
class Fit:
    """One convolution with a batch norm, in eval mode (None: the shortcut alone), and the R2 that it gives of the block's sum."""

    layers: tuple[nn.Conv2d, nn.BatchNorm2d] | None
    explained: float


@torch.no_grad()
def _fit_in_order(network: Network, parts: dict[fx.Node, _Part], inputs: tuple[Tensor, ...]) -> dict[fx.Node, Fit]:
    """Runs both networks through one graph: a value is a pair, the original's and that of the network collapsed so far; up to the first
    part they are one, and behind the last nothing is asked for.
    """
    fitted: dict[fx.Node, Fit] = {}
    generator = torch.Generator().manual_seed(0)

    @functools.lru_cache(maxsize=1)
    def own(node: fx.Node) -> Any:
        found = copy.deepcopy(network.own(node))
        return found.float() if isinstance(found, nn.Module) or found.is_floating_point() else found

    def side(node: fx.Node, values: Values, number: int) -> Any:
        return value_apart(node, lambda n: values[n][number], own, network.layers)

    def pair(node: fx.Node, values: Values) -> tuple[Any, Any]:
        original = side(node, values, 0)
        if node in parts:
            read, shortcut = values[parts[node].block.fork][1], values[_operands(parts[node].block)[1]][1]
            fitted[node], value = _fit(parts[node], read, original, shortcut, generator)
            return original, value
        if all(values[source][0] is values[source][1] for source in node.all_input_nodes):
            return original, original
        return original, side(node, values, 1)

    forks = {add: (part.block.fork,) for add, part in parts.items()}  # read once more, when its sum is there
    for _ in run(network.graph, tuple((x, x) for x in map(_to_float, inputs)), pair, forks):
        if len(fitted) == len(parts):
            break
    return fitted


def _to_float(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _fit(part: _Part, read: Tensor, total: Tensor, shortcut: Tensor, generator: torch.Generator) -> tuple[Fit, Tensor]:
    """The convolution of `read` (N, C, H, W) that comes nearest to what the shortcut leaves of the sum `total` (N, O, H', W')
    (to the sum itself where it stands for the shortcut, too; none in a dropped block besides), and what the block then gives.
    """
    variance = max(float(total.var((0, 2, 3)).sum()), 1e-30)
    if part.dropped and not part.fit_shortcut:
        return Fit(None, 1 - float((total - shortcut).var((0, 2, 3)).sum()) / variance), shortcut
    conv, _ = new_layers(part.block, part.dropped)
    weight, bias, error = least_squares(conv, read, total if part.dropped else total - shortcut, generator)
    conv.weight.copy_(weight)
    measured = Conv(conv.weight.double, bias.double(), conv.in_channels, norm=to_measure(conv.out_channels))
    norm = build_norm(measured, conv(read)).float().eval()
    value = norm(conv(read)) if part.dropped else shortcut + norm(conv(read))
    return Fit((conv.eval(), norm), 1 - error / variance), value


def _operands(block: Block) -> tuple[fx.Node, fx.Node]:
    """What the addition adds: (end of the branch, end of the shortcut)."""
    first, second = block.add.args[0], block.add.args[1]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return (first, second) if first in block.branch else (second, first)


def replace_branch(network: Network, block: Block, fit: Fit, dropped: bool = False) -> None:
    """The fitted layers in the graph, in double precision as everything there, instead of the branch; or instead of the block."""
    branch, shortcut = _operands(block)
    gone = block.branch
    if fit.layers is not None:
        conv = network.insert(block.add, f"{block.name}.conv", fit.layers[0].double(), block.fork)
        norm = network.insert(block.add, f"{block.name}.bn", fit.layers[1].double(), conv)
        conv.meta["shape"] = norm.meta["shape"] = shape_of(block.add)
        if dropped:
            shortcut, gone = norm, block.nodes
        else:
            block.add.replace_input_with(branch, norm)
    if dropped:
        network.bypass(block.add, shortcut)
        if shortcut is block.fork:
            _without_idle_activations(network, shortcut)
    for node in sorted(gone, reverse=True):
        network.take_out(node)


def _without_idle_activations(network: Network, source: fx.Node) -> None:
    """Takes out activations of `source` that change none of its values."""
    for user in list(source.users):
        layer = network.layer(user)
        rule = rule_of(layer) if isinstance(layer, nn.Module) else None
        if rule is not None and not rule.slopes and bool(free(rule, *range_of(source)).all()):
            network.bypass(user, source)
