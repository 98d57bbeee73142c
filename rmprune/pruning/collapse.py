"""Depth that a plain network does not need: the branch of a residual block becomes one convolution, fitted by least squares.

An approximation, unlike removal: the block relu(f(x) + x), f of several layers, becomes relu(w * x + x). That block RM then turns
into one plain convolution *without reserving a channel*, since branch and shortcut are linear and their kernels add up. So a network
of n blocks becomes a plain chain of n layers, half as deep as the original, whose channels are all free to be pruned. Runtimes
like it: the time of a small network goes with its number of layers more than with its MACs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.graph.activations import rule_of
from rmprune.graph.build import build_norm, materialise, target_of
from rmprune.graph.convolution import Conv, Obstacle, to_measure
from rmprune.graph.equivalence import reference_copy
from rmprune.graph.inputs import Inputs, as_given
from rmprune.graph.network import Network, shape_of
from rmprune.graph.normalise import normalise
from rmprune.graph.ranges import annotate_ranges
from rmprune.graph.run import Values, node_value, run
from rmprune.graph.shapes import to_double
from rmprune.pruning.reconstruct import least_squares
from rmprune.removal.blocks import Block, additions, find_block

INPUTS = 8192  # unknowns of a fit (channels times kernel) at most: its equations are that many squared


@dataclass(frozen=True)
class Collapse:
    """What `collapse_blocks` made.

    model: eval mode, dtype, device and memory format of the original, residuals still in it.
    collapsed: {block: R2}, the part of its sum's variance on the images that one convolution and the shortcut still give.
    kept: {block: reason} of the others.

    >>> model, images = rmprune.models.create("resnet8", num_classes=10, width=4).eval(), torch.randn(16, 3, 8, 8)
    >>> found = rmprune.collapse_blocks(model, images, keep=["layer3.0"])
    >>> list(found.collapsed), found.kept
    (['layer1.0', 'layer2.0'], {'layer3.0': 'asked to stay'})
    """

    model: nn.Module
    collapsed: dict[str, float]
    kept: dict[str, str]


def collapse_blocks(model: nn.Module, images: Inputs, *, keep: Iterable[str] = ()) -> Collapse:
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
    model, given = as_given(model, images)
    inputs = tuple(x.cpu() for x in given)
    network = normalise(reference_copy(model), tuple(to_double(x[:2]) for x in inputs))
    annotate_ranges(network)
    left = set(keep)
    found = additions(network)
    names = [name for name, _ in found]
    if left - set(names):
        raise ConfigError(f"keep: no block {', '.join(sorted(left - set(names)))}; there are: {', '.join(names)}")
    kept = {name: "asked to stay" for name in names if name in left}
    blocks = {}
    for name, add in found:
        try:
            if name not in left:
                blocks[add] = _collapsible(network, name, add)
        except Obstacle as obstacle:
            kept[name] = str(obstacle)
    if not blocks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise UnsupportedModel(f"no block to collapse: {reasons or 'the network has no residual'}")
    fitted = _fit_in_order(network, blocks, inputs)
    for add, fit in fitted.items():
        _replace_branch(network, blocks[add], fit)
    result, _ = materialise(network, tuple(to_double(x[:1]) for x in inputs), 1, target_of(model), batch_norm=True)
    return Collapse(result, {blocks[add].name: fit.explained for add, fit in fitted.items()}, kept)


def _collapsible(network: Network, name: str, add: fx.Node) -> Block:
    """The block that ends in this addition. Raises Obstacle where one convolution cannot stand for its branch."""
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
    if not users or not all(isinstance(layer, nn.Module) and rule_of(layer) is not None for layer in users):
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


def _geometry(block: Block) -> tuple[tuple[int, int], tuple[int, int]]:
    """(kernel, stride) of the one convolution: the largest kernel of the branch, made odd, and the product of its strides."""
    kernel, stride = [1, 1], [1, 1]
    for layer in block.layers:
        for axis in (0, 1):
            kernel[axis] = max(kernel[axis], layer.conv.geometry.kernel[axis] | 1)
            stride[axis] *= layer.conv.geometry.stride[axis]
    return (kernel[0], kernel[1]), (stride[0], stride[1])


@dataclass(frozen=True)
class _Fit:
    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    explained: float


@torch.no_grad()
def _fit_in_order(network: Network, blocks: dict[fx.Node, Block], inputs: tuple[Tensor, ...]) -> dict[fx.Node, _Fit]:
    """Runs both networks through one graph: a value is a pair, the original's and that of the network collapsed so far."""
    fitted: dict[fx.Node, _Fit] = {}
    generator = torch.Generator().manual_seed(0)

    def own(node: fx.Node) -> Any:
        found = copy.deepcopy(network.own(node))
        return found.float() if isinstance(found, nn.Module) or found.is_floating_point() else found

    def pair(node: fx.Node, values: Values) -> tuple[Any, Any]:
        original = node_value(node, lambda n: values[n][0], own)
        if node not in blocks:
            return original, node_value(node, lambda n: values[n][1], own)
        read, shortcut = values[blocks[node].fork][1], values[_operands(blocks[node])[1]][1]
        fit = fitted[node] = _fit(blocks[node], read, original, shortcut, generator)
        return original, shortcut + fit.norm(fit.conv(read))

    forks = {add: (block.fork,) for add, block in blocks.items()}  # read once more, when its sum is there
    for _ in run(network.graph, tuple((x, x) for x in map(_to_float, inputs)), pair, forks):
        pass
    return fitted


def _to_float(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _fit(block: Block, read: Tensor, total: Tensor, shortcut: Tensor, generator: torch.Generator) -> _Fit:
    """The convolution of `read` (N, C, H, W) that comes nearest to what the shortcut leaves of the sum `total` (N, O, H', W')."""
    kernel, stride = _geometry(block)
    channels, out = read.shape[1], total.shape[1]
    conv = nn.Conv2d(channels, out, kernel, stride, (kernel[0] // 2, kernel[1] // 2), bias=False)
    weight, bias, error = least_squares(conv, read, total - shortcut, generator)
    conv.weight.copy_(weight)
    explained = 1 - error / max(float(total.var((0, 2, 3)).sum()), 1e-30)
    measured = Conv(conv.weight.double, bias.double(), channels, norm=to_measure(out))
    norm = build_norm(measured, conv(read))
    return _Fit(conv.eval(), norm.float().eval(), explained)


def _operands(block: Block) -> tuple[fx.Node, fx.Node]:
    """What the addition adds: (end of the branch, end of the shortcut)."""
    first, second = block.add.args[0], block.add.args[1]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return (first, second) if first in block.branch else (second, first)


def _replace_branch(network: Network, block: Block, fit: _Fit) -> None:
    """The fitted layers in the graph, in double precision as everything there, instead of the branch."""
    end, _ = _operands(block)
    graph = network.graph
    with graph.inserting_before(block.add):
        conv = graph.call_module(network.add(f"{block.name}.conv", fit.conv.double()), (block.fork,))
        norm = graph.call_module(network.add(f"{block.name}.bn", fit.norm.double()), (conv,))
    conv.meta["shape"] = norm.meta["shape"] = shape_of(block.add)
    block.add.replace_input_with(end, norm)
    for node in reversed(block.branch):
        graph.erase_node(node)
        network.layers.pop(str(node.target), None)
