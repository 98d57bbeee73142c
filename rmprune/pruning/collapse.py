"""Depth that a plain network does not need: the branch of a residual block becomes one convolution, fitted by least squares.

An approximation, unlike removal: the block relu(f(x) + x), f of several layers, becomes relu(w * x + x). That block RM then turns
into one plain convolution *without reserving a channel*, since branch and shortcut are linear and their kernels add up. So a network
of n blocks becomes a plain chain of n layers, half as deep as the original, whose channels are all free to be pruned. Runtimes
like it: the time of a small network goes with its number of layers more than with its MACs.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.graph.build import destination_of, materialise
from rmprune.graph.equivalence import refuse_stuck, refuse_unseen
from rmprune.graph.foreign import eval_copy, reference_copy
from rmprune.graph.inputs import Inputs, as_given, as_names
from rmprune.graph.network import Network
from rmprune.graph.normalise import normalise
from rmprune.graph.obstacle import Obstacle
from rmprune.graph.ranges import annotate_ranges
from rmprune.graph.tensors import to_double
from rmprune.graph.tf32 import tf32
from rmprune.pruning.one_convolution import (
    Change,
    Ending,
    Fits,
    Part,
    collapsible,
    ending_of,
    fit_in_order,
    operands,
    put_ending,
    replace_branch,
    without_idle_activations,
)
from rmprune.removal.blocks import additions, find_block

MENDED = 2  # so many blocks that stay behind one that is merged or dropped have their last convolution fitted anew
_SEEN = 1e-10  # by how much what torch.fx read may differ from the network, relative, in float64


@dataclass(frozen=True)
class Collapse:
    """What `collapse_blocks` made.

    model: eval mode, dtype, device and memory format of the original, residuals still in it.
    collapsed: {block: R2}, the part of its sum's variance on the images that one convolution and the shortcut still give.
    kept: {block: reason} of the others.
    note: what to know of it: where sizes decided what was read, autocast that is left out; empty as a rule.

    >>> model, images = rmprune.models.create("resnet8", num_classes=10, width=4).eval(), torch.randn(16, 3, 8, 8)
    >>> found = rmprune.collapse_blocks(model, images, keep=["layer3.0"])
    >>> list(found.collapsed), found.kept
    (['layer1.0', 'layer2.0'], {'layer3.0': 'asked to stay'})
    """

    model: nn.Module
    collapsed: dict[str, float]
    kept: dict[str, str]
    note: str = ""


@tf32(False, "cuda")
@torch.inference_mode(False)  # what it makes can be trained
def collapse_blocks(model: nn.Module, images: Inputs, *, keep: Iterable[str] | None = ()) -> Collapse:
    """Each residual block's branch of several layers as one convolution, with a batch norm after it. `model` is left alone.

    The kernel is the branch's largest, the stride its own; blocks that this would make dearer (bottlenecks) are kept.
    Blocks are fitted in order, each to the sum (branch and shortcut) of the original while it reads what the collapsed network
    gives it, so that later blocks make up for earlier ones.
    images: (N, C, H, W), or a tuple or dict of inputs: some hundred training images, all held in memory at once.
    `keep`: names of blocks to leave, as they are.

    Raises UnsupportedModel where torch.fx cannot follow the model or no block can be collapsed, ConfigError for an unknown block.

    >>> model, images = rmprune.models.create("resnet8", num_classes=10, width=4).eval(), torch.randn(16, 3, 8, 8)
    >>> shallow = rmprune.collapse_blocks(model, images).model
    >>> [block.reserved for block in rmprune.remove_residuals(shallow, images).blocks]  # RM then needs no channel for it
    [0, 0, 0]
    """

    def pick(network: Network, name: str, add: fx.Node) -> Part | str:
        return "asked to stay" if name in left else Part(collapsible(network, name, add))

    left = set(as_names(keep, "keep"))
    ((_, found),) = _reshaped(model, images, dict.fromkeys(left, "keep"), [pick])
    if not found.collapsed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.kept.items())
        raise UnsupportedModel(f"no block to collapse: {reasons or 'the network has no residual'}")
    return found


def shorten_blocks(
    model: nn.Module, images: Inputs, *, collapse: Iterable[str] = (), drop: Iterable[str] = ()
) -> Collapse:
    """`collapse_blocks` for the blocks named (linear ones, too; one of one layer stays), and without the branch of those in `drop`.

    What a dropped block leaves is its shortcut: fitted to the block's sum where it is a convolution, else as it is, and without the
    activation behind it where that changes nothing. Its R2 stands among the others' in `collapsed`. Of the next MENDED blocks that stay
    the last convolution is fitted to the original's sum as well, where it is a plain one with at most a batch norm behind it.
    Raises UnsupportedModel where a block cannot be had so, with the reason, ConfigError for an unknown block.
    """
    ((_, found),) = shorten_each(model, images, [dict.fromkeys(collapse, False) | dict.fromkeys(drop, True)])
    return found


def shorten_each(
    model: nn.Module, images: Inputs, ways: Sequence[Mapping[str, bool]]
) -> Iterator[tuple[int, Collapse]]:
    """`shorten_blocks` in several ways {block: whether it is dropped, or collapsed}, each with its number as soon as it is fitted: what
    they share is run once. Raises UnsupportedModel for a block that cannot be shortened so."""

    def pick(way: Mapping[str, bool], network: Network, name: str, add: fx.Node) -> Part | str:
        if name not in way:
            return "asked to stay"
        try:
            block = find_block(network, name, add)
            if way[name]:
                return Part(block, True)
            return Part(collapsible(network, name, add, True)) if len(block.layers) > 1 else "one layer already"
        except Obstacle as obstacle:
            raise UnsupportedModel(f"{name}: {obstacle}") from None

    named = {name: "drop" if dropped else "collapse" for way in ways for name, dropped in way.items()}
    return _reshaped(model, images, named, [partial(pick, way) for way in ways], behind=MENDED)


def read_additions(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Network, list[tuple[str, fx.Node]]]:
    """The network as removal reads it, in float64 and with the range of every channel, and its additions by the names of their blocks."""
    network = normalise(reference_copy(model), tuple(to_double(x[:2]) for x in inputs), dropout=True)
    annotate_ranges(network)
    return network, additions(network)


Pick = Callable[[Network, str, fx.Node], Part | str]
"""(network, block, its addition) -> the part that it becomes, or (also by an Obstacle) why it stays."""


def _reshaped(
    model: nn.Module, images: Inputs, named: Mapping[str, str], picks: Sequence[Pick], behind: int = 0
) -> Iterator[tuple[int, Collapse]]:
    """What each pick makes of the network, with its number. `named`: {block: the argument that names it}; `behind`: of so many blocks that
    stay behind a part the end is fitted anew."""
    model, given = as_given(model, images)
    inputs = tuple(x.cpu() for x in given)
    network, found = read_additions(model, inputs)
    names = [name for name, _ in found]
    if unknown := sorted(named.keys() - set(names)):
        where = " and ".join(sorted({named[name] for name in unknown}))
        raise ConfigError(f"{where}: no block {', '.join(unknown)}; there are: {', '.join(names)}")
    changes = {number: _change(network, found, pick, behind) for number, pick in enumerate(picks)}
    for number, (change, kept) in list(changes.items()):
        if not change.parts:
            del changes[number]
            yield number, Collapse(model, {}, kept)
    if not changes:
        return
    refuse_unseen(model, inputs, _SEEN)
    numbers = list(changes)
    for at, fits in fit_in_order(network, [change for change, _ in changes.values()], inputs):
        number = numbers[at]
        own, (change, kept) = network, changes[number]
        if len(changes) > 1:  # others are fitted to it yet
            own, found = read_additions(model, inputs)
            change, _ = _change(own, found, picks[number], behind)
        result, explained = _changed(own, change, fits, model, inputs)
        yield number, Collapse(result, explained, kept, network.note)


def _change(
    network: Network, found: list[tuple[str, fx.Node]], pick: Pick, behind: int
) -> tuple[Change, dict[str, str]]:
    """What a pick makes of the network's additions, and {block: reason} of those that stay."""
    kept: dict[str, str] = {}
    parts: dict[fx.Node, Part] = {}
    for name, add in found:
        try:
            picked = pick(network, name, add)
        except Obstacle as obstacle:
            picked = str(obstacle)
        if isinstance(picked, str):
            kept[name] = picked
        else:
            parts[add] = picked
    return Change(parts, _behind(network, found, parts, behind)), kept


def _changed(
    network: Network, change: Change, fits: Fits, model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[nn.Module, dict[str, float]]:
    """`network`, which is changed, as a module like `model`; and R2 of its parts."""
    for add, ending in change.endings.items():
        if add.name in fits.mended:
            put_ending(network, ending, fits.mended[add.name])
    joined: dict[fx.Node, fx.Node] = {}  # what stands in the place of a dropped block's sum
    for add, part in reversed(list(change.parts.items())):  # a fork is what an earlier block gives
        if part.dropped and not fits.fitted[add.name].layers:
            joined[add] = operands(part.block)[1]
        replace_branch(network, part.block, fits.fitted[add.name], part.dropped)
    annotate_ranges(network)
    for fork in {part.block.fork: None for add, part in change.parts.items() if joined.get(add) is part.block.fork}:
        while fork in joined:
            fork = joined[fork]
        without_idle_activations(network, fork)
    destination = destination_of(model)
    result, _ = materialise(network, tuple(to_double(x[:1]) for x in inputs), 1, destination, batch_norm=True)
    refuse_stuck(eval_copy(model), result, (x[:1].to(destination.device) for x in inputs))
    return result, {part.block.name: fits.fitted[add.name].explained for add, part in change.parts.items()}


def _behind(
    network: Network, found: list[tuple[str, fx.Node]], parts: Mapping[fx.Node, Part], count: int
) -> dict[fx.Node, Ending]:
    """Of the next `count` blocks that stay behind each part, those whose last convolution can be fitted anew."""
    endings: dict[fx.Node, Ending] = {}
    left = 0
    for name, add in found:
        if add in parts:
            left = count
        elif left:
            with contextlib.suppress(Obstacle):  # an addition that ends no block
                block = find_block(network, name, add)
                left -= 1
                if (ending := ending_of(network, block)) is not None:
                    endings[add] = ending
    return endings
