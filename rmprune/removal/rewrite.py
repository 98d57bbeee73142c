"""Replaces blocks by their plain chains in the graph, innermost first. Weights are not built here."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from rmprune.errors import ConfigError
from rmprune.graph.convolution import Conv, Geometry, Obstacle, or_none, output_size
from rmprune.graph.network import Network, linear_layer, shape_of, spatial
from rmprune.removal.blocks import Block, Layer, additions, find_block
from rmprune.removal.copies import Entries, Side, assemble, entries_of, spread_norm
from rmprune.removal.geometry import chain_taps
from rmprune.removal.plan import Schedule, schedule


@dataclass(frozen=True)
class BlockReport:
    """One residual addition: whether it can go, how, and what its layers cost before and after.

    macs are multiply-accumulates for one image of the given size; form is how copies pass the activations: `free` (already where
    the activation is the identity), `shift`, `pair`, `slope`, `slice` (beside it), `linear` (no activation in between), or
    several joined by `+`. note: a limit of the exactness that a user has to know.
    """

    name: str
    removable: bool
    reason: str = ""
    form: str = ""
    shortcut: str = ""
    reserved: int = 0
    macs_before: int = 0
    macs_after: int = 0
    params_before: int = 0
    params_after: int = 0
    note: str = ""


def remove_all(
    network: Network, keep: Iterable[str], form: str, progress: Callable[[str], None] | None = None
) -> list[BlockReport]:
    """Rewrites every addition that can go, in topological order, and reports on each. Blocks named in `keep` are left."""
    found = additions(network)
    kept = set(keep)
    unknown = kept - {name for name, _ in found} - {name.split("#")[0] for name, _ in found}
    if unknown:
        raise ConfigError(
            f"keep names no residual: {', '.join(sorted(unknown))}; there are {', '.join(n for n, _ in found) or 'none'}"
        )
    reports = []
    for name, add in found:
        if name in kept or name.split("#")[0] in kept:
            reports.append(BlockReport(name, False, "kept, as asked for"))
            continue
        block: Block | None = None
        try:
            block = find_block(network, name, add)
            plan = schedule(block, form)
        except Obstacle as obstacle:
            reports.append(_kept(name, str(obstacle), block))
            continue
        reports.append(_report(block, plan, _note(network, block)))
        _replace(network, block, plan)
        if progress is not None:
            progress(name)
    return reports


def _kept(name: str, reason: str, block: Block | None) -> BlockReport:
    if block is None:
        return BlockReport(name, False, reason)
    return BlockReport(name, False, reason, "", block.shortcut, 0, *_cost_before(block))


def _report(block: Block, plan: Schedule, note: str) -> BlockReport:
    macs, params = _cost_before(block)
    forms = "+".join(sorted(plan.forms)) or ("free" if plan.reserved else "linear")
    return BlockReport(
        block.name, True, "", forms, block.shortcut, plan.reserved, macs, plan.macs(), params, plan.params(), note
    )


def _note(network: Network, block: Block) -> str:
    """What to know of a pool with ceil_mode: where its last window is partial, no kernel does what it does."""
    pools = [network.layer(node) for node in block.nodes]
    ceiling = [p for p in pools if isinstance(p, nn.AvgPool2d) and p.ceil_mode and p.stride not in (1, (1, 1), [1, 1])]
    if not ceiling:
        return ""
    return (
        "exact on maps that the windows of its pool (ceil_mode=True) divide, as at the size shown; at other sizes the last, "
        "partial window of the original is not reproduced"
    )


def _cost_before(block: Block) -> tuple[int, int]:
    """MACs and parameters of the block's own convolutions; layers that removal would insert are not there yet."""
    own = {str(node.target) for node in block.nodes}
    pairs = [(layer.conv, layer.out_size) for layer in block.layers if layer.conv.name in own]
    pairs += [
        (stage.conv, output_size(stage.conv.geometry, stage.size))
        for stage in block.stages
        if stage.conv.name in own and _weighs(stage.conv)
    ]
    return sum(conv.macs(size) for conv, size in pairs), sum(conv.params() for conv, _ in pairs)


def _weighs(conv: Conv) -> bool:
    return conv.groups < conv.in_channels or conv.groups == 1


def _replace(network: Network, block: Block, plan: Schedule) -> None:
    """The plain chain takes the place of branch, shortcut and addition; what nothing reads any more goes."""
    for node in block.nodes:
        network.layers.pop(str(node.target), None)
    current = block.fork
    batch = (shape_of(block.fork) or (1,))[0]
    with network.graph.inserting_before(block.add):
        for layer in plan.layers:
            current = _insert(network, current, layer, batch, block)
    current.meta.update({key: block.add.meta[key] for key in ("range", "seen") if key in block.add.meta})
    block.add.replace_all_uses_with(current)
    network.graph.erase_node(block.add)
    for node in sorted(block.nodes, reverse=True):
        network.graph.erase_node(node)


def _insert(network: Network, source: fx.Node, layer: Layer, batch: int, block: Block) -> fx.Node:
    shape = (batch, layer.conv.out_channels, *layer.out_size)
    target = network.add(layer.conv.name, replace(layer.conv))
    node = network.graph.call_module(target, (source,))
    node.meta = {"shape": shape, "nn_module_stack": block.add.meta.get("nn_module_stack", {})}
    if layer.activation is None:
        return node
    if layer.split:
        return _insert_beside(network, node, layer, shape)
    node = network.graph.call_module(network.add(layer.activation_name, layer.activation), (node,))
    node.meta = {"shape": shape, "nn_module_stack": block.add.meta.get("nn_module_stack", {})}
    return node


def _insert_beside(network: Network, source: fx.Node, layer: Layer, shape: tuple[int, ...]) -> fx.Node:
    """cat(act(x[:, :split]), x[:, split:])"""
    assert isinstance(layer.activation, nn.Module)
    graph, every = network.graph, slice(None)
    own = graph.call_function(operator.getitem, (source, (every, slice(None, layer.split))))
    active = graph.call_module(network.add(layer.activation_name, layer.activation), (own,))
    beside = graph.call_function(operator.getitem, (source, (every, slice(layer.split, None))))
    joined = graph.call_function(torch.cat, ([active, beside], 1))
    for node, channels in (
        (own, layer.split),
        (active, layer.split),
        (beside, shape[1] - layer.split),
        (joined, shape[1]),
    ):
        node.meta = {"shape": (shape[0], channels, *shape[2:]), "nn_module_stack": source.meta["nn_module_stack"]}
    return joined


def join_copies(network: Network) -> int:
    """cat(x[:, :k], conv(x)) -> one convolution, wherever it is exact; returns how many concatenations went."""
    count = 0
    for node in list(network.graph.nodes):
        if node.op == "call_function" and node.target in (torch.cat, torch.concat) and _over_channels(node):
            found = _joined(network, node)
            if found is not None:
                _replace_concatenation(network, node, *found)
                count += 1
    return count


def _over_channels(node: fx.Node) -> bool:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return dim in (1, -3) and len(shape_of(node) or ()) == 4


def _joined(network: Network, node: fx.Node) -> tuple[fx.Node, fx.Node, Conv] | None:
    """(source, the convolution's node, the joined layer), where all parts but one are channels of its own input."""
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or not all(isinstance(part, fx.Node) for part in parts):
        return None
    convs = [part for part in parts if isinstance(part, fx.Node) and isinstance(network.layer(part), Conv)]
    if len(convs) != 1 or len(convs[0].users) > 1 or not isinstance(convs[0].args[0], fx.Node):
        return None
    own, source = network.layer(convs[0]), convs[0].args[0]
    assert isinstance(own, Conv)
    rows, columns, first, positions = [], [], 0, torch.empty(0)
    for part in parts:
        assert isinstance(part, fx.Node)
        channels = (shape_of(part) or (0, 0))[1]
        if part is convs[0]:
            positions = torch.arange(first, first + channels)
        else:
            copied = _copied(network, part, source)
            if copied is None:
                return None
            rows.append(first + torch.arange(channels))
            columns.append(copied)
        first += channels
    taps = or_none(chain_taps, (own.geometry,), (Geometry(padding_mode=own.geometry.padding_mode),), spatial(source))
    if taps is None or not rows:
        return None
    index = torch.cat(rows)
    extra = Entries(index, torch.cat(columns), torch.ones(len(index), 1, 1, dtype=torch.float64))
    before, after = Side(torch.arange(own.in_channels), own.in_channels), Side(positions, first)
    layer = or_none(assemble, own, before, after, own.groups, extra, taps[0])
    return None if layer is None else (source, convs[0], replace(layer, norm=spread_norm(own.norm, positions, first)))


def _copied(network: Network, part: fx.Node, source: fx.Node) -> torch.Tensor | None:
    """The channels of `source` that `part` is, if it is nothing else."""
    if part is source:
        return torch.arange((shape_of(source) or (0, 0))[1])
    if part.op != "call_function" or part.args[0] is not source:
        return None
    layer = or_none(linear_layer, network, part)
    if layer is None or layer.geometry != Geometry():
        return None
    entries = entries_of(layer)
    plain = len(entries.rows) == layer.out_channels and bool((entries.kernel == 1).all()) and not bool(layer.bias.any())
    return entries.columns if plain and torch.equal(entries.rows, torch.arange(layer.out_channels)) else None


def _replace_concatenation(network: Network, node: fx.Node, source: fx.Node, conv: fx.Node, layer: Conv) -> None:
    parts = [part for part in node.all_input_nodes if part is not source]
    network.layers.pop(str(conv.target), None)
    with network.graph.inserting_before(node):
        joined = network.graph.call_module(network.add(layer.name, layer), (source,))
    joined.meta = dict(node.meta)
    node.replace_all_uses_with(joined)
    network.graph.erase_node(node)
    for part in parts:
        if not part.users:
            network.graph.erase_node(part)
