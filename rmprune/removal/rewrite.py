"""Replaces blocks by their plain chains in the graph, innermost first. Weights are not built here."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from rmprune.errors import ConfigError
from rmprune.removal.blocks import Block, Layer, additions, find_block
from rmprune.removal.geometry import output_size
from rmprune.removal.kernels import Conv
from rmprune.removal.network import Network, shape_of
from rmprune.removal.schedule import Schedule, schedule


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
        block = find_block(network, name, add)
        plan = block if isinstance(block, str) else schedule(block, form)
        if isinstance(block, str) or isinstance(plan, str):
            reports.append(_kept(name, block, plan))
            continue
        reports.append(_report(block, plan, _note(network, block)))
        _replace(network, block, plan)
        if progress is not None:
            progress(name)
    return reports


def _kept(name: str, block: Block | str, plan: Schedule | str) -> BlockReport:
    assert isinstance(plan, str)
    if isinstance(block, str):
        return BlockReport(name, False, plan)
    return BlockReport(name, False, plan, "", block.shortcut, 0, *_cost_before(block))


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
