"""Replaces blocks by their plain chains in the graph, innermost first. Weights are not built here."""

import operator
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import fx, nn

from rmprune.errors import ConfigError
from rmprune.graph.convolution import Pair
from rmprune.graph.fuse import fuse_convolutions, join_norms
from rmprune.graph.inputs import as_names
from rmprune.graph.network import Network, shape_of
from rmprune.graph.obstacle import Obstacle
from rmprune.graph.ranges import annotate_range
from rmprune.removal.blocks import Block, additions, find_block
from rmprune.removal.chain import ChainLayer
from rmprune.removal.cost import by_block, cost_of, parameters
from rmprune.removal.join_copies import join_copies
from rmprune.removal.reports import BlockReport, Plan
from rmprune.removal.schedule import Schedule, schedule
from rmprune.removal.settings import RemovalSettings


def remove_all(network: Network, settings: RemovalSettings, progress: Callable[[str], None] | None = None) -> Plan:
    """Rewrites every addition that can go, in topological order, joins what can be joined, and reports on each addition.

    Blocks named in `settings.keep` are left; the linear layers beside those in `fused` are multiplied, whatever `fuse` says. An obstacle
    met anywhere in finding or planning a block ends here, as its reason to stay. Raises ConfigError for a name in them that is no
    residual's.
    """
    found = additions(network)
    kept, always = set(as_names(settings.keep, "keep")), set(as_names(settings.fused, "fused"))
    for setting, names in (("keep", kept), ("fused", always)):
        if unknown := names - {name for name, _ in found} - {name.split("#")[0] for name, _ in found}:
            there = ", ".join(name for name, _ in found) or "none"
            raise ConfigError(f"{setting} names no residual: {', '.join(sorted(unknown))}; there are {there}")
    reports = Plan()
    original = cost_of(network, network.graph.nodes)[0], parameters(network)
    for name, add in found:
        if name in kept or name.split("#")[0] in kept:
            reports.append(BlockReport(name, False, "kept, as asked for"))
            continue
        block: Block | None = None
        try:
            block = find_block(network, name, add)
            chain = schedule(block, settings.form)
        except Obstacle as obstacle:
            reports.append(_kept(network, name, str(obstacle), block))
            continue
        before, note = cost_of(network, block.nodes), _note(network, block)
        after = cost_of(network, _replace(network, block, chain))
        forms = "+".join(sorted(chain.forms)) or ("free" if chain.reserved else "linear")
        costs = before[0], after[0], before[1], after[1]
        reports.append(BlockReport(name, True, "", forms, block.shortcut, chain.reserved, *costs, note))
        if progress is not None:
            progress(name)
    _join(network, reports, settings, always)
    final = cost_of(network, network.graph.nodes, settings.batch_norm)
    reports.macs_change, reports.params_change = final[0] - original[0], final[1] - original[1]
    return reports


def _kept(network: Network, name: str, reason: str, block: Block | None) -> BlockReport:
    if block is None:
        return BlockReport(name, False, reason)
    macs, params = cost_of(network, block.nodes)
    for node in block.nodes:
        node.meta["block"] = name
    return BlockReport(name, False, reason, "", block.shortcut, 0, macs, macs, params, params)


def _join(network: Network, reports: Plan, settings: RemovalSettings, fused: Collection[str]) -> None:
    """Norms and neighbouring convolutions as one, as asked for; what that changes in a block's cost goes into its report."""
    before = by_block(network)
    if not settings.batch_norm:
        join_norms(network)
    if settings.fuse != "never":
        join_copies(network)
    fuse_convolutions(network, settings.fuse, fused)
    after = by_block(network, settings.batch_norm)
    for index, report in enumerate(reports):
        macs, params = (new - old for new, old in zip(after[report.name], before[report.name], strict=True))
        reports[index] = replace(report, macs_after=report.macs_after + macs, params_after=report.params_after + params)


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


def _replace(network: Network, block: Block, chain: Schedule) -> list[fx.Node]:
    """The plain chain, whose nodes are returned, takes the place of branch, shortcut and addition; what nothing reads any more goes."""
    for node in block.nodes:
        network.layers.pop(str(node.target), None)
    made = [block.fork]
    with network.graph.inserting_before(block.add):
        for layer in chain.layers:
            made += _insert(network, made[-1], layer)
    current = made[-1]
    for node in made[1:]:
        node.meta |= {"block": block.name, "nn_module_stack": block.add.meta.get("nn_module_stack", {})}
    current.meta.update({key: block.add.meta[key] for key in ("range", "seen") if key in block.add.meta})
    block.add.replace_all_uses_with(current)
    network.graph.erase_node(block.add)
    for node in sorted(block.nodes, reverse=True):
        network.graph.erase_node(node)
    return made[1:]


def _insert(network: Network, source: fx.Node, layer: ChainLayer) -> list[fx.Node]:
    """The nodes of a layer: its convolution, and what follows it on all channels or, where it is split, on its own alone.

    y = gate(act(x)), or y = gate(act(x[:, :split])) with x[:, split:] beside it; with a tail, cat(y, tail(y), copies).
    """
    graph, every, channels = network.graph, slice(None), layer.conv.out_channels
    batch = (shape_of(source) or (1,))[0]
    conv = graph.call_module(network.add(layer.conv.name, replace(layer.conv)), (source,))
    conv.meta |= {"range": layer.range, "shape": (batch, channels, *layer.out_size)}
    conv.meta |= {} if layer.seen is None else {"seen": layer.seen}
    added = [conv]

    def add(node: fx.Node, count: int, size: Pair = layer.out_size) -> fx.Node:
        node.meta["shape"] = (batch, count, *size)
        annotate_range(network, node)
        added.append(node)
        return node

    def cut(node: fx.Node, at: int) -> tuple[fx.Node, list[fx.Node]]:
        """The channels of a node before and from `at` on; nothing beside where that are all."""
        count = (shape_of(node) or (0, 0))[1]
        if at in (0, count):
            return node, []
        first, rest = (
            add(graph.call_function(operator.getitem, (node, (every, part))), number)
            for part, number in ((slice(None, at), at), (slice(at, None), count - at))
        )
        return first, [rest]

    def activated(current: fx.Node) -> fx.Node:
        if layer.activation is None:
            return current
        return add(graph.call_module(network.add(layer.activation_name, layer.activation), (current,)), own)

    def gated(current: fx.Node) -> fx.Node:
        if layer.gate is None:
            return current
        add(graph.call_module(network.add(layer.gate.pool_name, layer.gate.pool), (current,)), own, (1, 1))
        for inner in layer.gate.layers:
            added.extend(_insert(network, added[-1], inner))
        return add(graph.call_function(operator.mul, (current, added[-1])), own)

    current, beside = cut(conv, layer.split)
    own = layer.split or channels
    current = activated(gated(current)) if layer.gate_first else gated(activated(current))
    parts = [current]
    if layer.tail:
        current, copies = cut(current, layer.tail[0].conv.in_channels)
        beside, end = beside + copies, current
        for inner in layer.tail:
            added += _insert(network, end, inner)
            end = added[-1]
        parts = [current, end]
    if len(parts + beside) > 1:
        total = sum((shape_of(part) or (0, 0))[1] for part in parts + beside)
        add(graph.call_function(torch.cat, (parts + beside, 1)), total)
    return added
