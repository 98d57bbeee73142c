"""A convolution beside copies of its own input, concatenated, becomes one convolution, wherever that is exact."""

from dataclasses import replace

import torch
from torch import fx

from rmprune.graph.convolution import Conv, Geometry
from rmprune.graph.network import Network, joined_maps, linear_layer, shape_of, spatial
from rmprune.graph.obstacle import or_none
from rmprune.removal.copies import Entries, Side, assemble, entries_of, spread_norm
from rmprune.removal.geometry import chain_taps


def join_copies(network: Network) -> int:
    """cat(x[:, :k], conv(x)) -> one convolution, wherever it is exact; returns how many concatenations went."""
    count = 0
    for node in list(network.graph.nodes):
        found = _joined(network, node)
        if found is not None:
            _replace_concatenation(network, node, *found)
            count += 1
    return count


def _joined(network: Network, node: fx.Node) -> tuple[fx.Node, fx.Node, Conv] | None:
    """(source, the convolution's node, the joined layer), where all parts but one are channels of its own input."""
    parts = joined_maps(node)
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
    joined = network.insert(node, layer.name, layer, source)
    joined.meta = conv.meta | node.meta
    network.bypass(node, joined)
    for part in parts:
        if not part.users:
            network.graph.erase_node(part)
