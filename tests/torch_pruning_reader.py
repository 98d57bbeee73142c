"""The groups as Torch-Pruning sees them, read from its dependency graph: what our own are compared with. Not used by rmprune."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.shapes import record_shapes
from rmprune.pruning.groups import (
    Group,
    Member,
    Structure,
    with_ports,
)
from rmprune.pruning.layers import Weighted, is_depthwise, sized_layers

if TYPE_CHECKING:
    import torch_pruning as tp


def dependency_structure(model: nn.Module, example_inputs: Tensor) -> Structure:
    """The groups of any network Torch-Pruning can follow. What cannot be sliced exactly is frozen, with the reason."""
    import torch_pruning as tp  # and timm with it, for those tests alone: more kinds of modules make each tracing slower

    shapes = record_shapes(model, example_inputs, Weighted)
    twin = copy.deepcopy(model).requires_grad_(True).eval()
    try:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(twin, example_inputs, verbose=False)
        all_groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear, nn.ConvTranspose2d]))
    except Exception as error:  # whatever it meets in a network that it does not know
        raise UnsupportedModel(
            f"{type(model).__name__}: Torch-Pruning cannot follow this network ({type(error).__name__}: {error})"
        ) from error
    names = {module: name for name, module in twin.named_modules()}
    groups: list[Group] = []
    frozen: dict[str, str] = {}
    for found in all_groups:
        root = names[found[0].dep.target.module]
        try:
            groups.append(_read_group(root, found, graph, names))
        except UnsupportedModel as reason:
            frozen[root] = str(reason)
    structure = Structure(tuple(groups), sized_layers(model, example_inputs, shapes), frozen)
    return with_ports(_without_overlaps(structure))


def _read_group(root: str, found: tp.Group, graph: tp.DependencyGraph, names: Mapping[nn.Module, str]) -> Group:
    units = len(found[0].idxs)
    members: dict[tuple[str, str], Member] = {}
    parts = 1
    for item in found.items:
        node, module = item.dep.target, item.dep.target.module
        reads = graph.is_in_channel_pruning_fn(item.dep.handler) and isinstance(module, nn.Conv2d | nn.Linear)
        if isinstance(module, nn.Parameter):
            raise UnsupportedModel("a free-standing parameter has these channels")
        depthwise = is_depthwise(module)
        if not node.outputs and (depthwise or not reads):
            raise UnsupportedModel("its channels are the network's output")
        if module not in names:
            continue
        name = names[module]
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or depthwise:
            side = "tied"
        elif isinstance(module, nn.PReLU):
            if module.num_parameters == 1:
                continue
            side = "tied"
        elif isinstance(module, nn.Conv2d | nn.Linear):
            side = "in" if reads else "out"
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                parts = math.lcm(parts, module.groups)
        else:
            raise UnsupportedModel(f"{name} ({type(module).__name__}) has these channels and cannot be sliced")
        index = _index(name, item.idxs, item.root_idxs, units)
        if (name, side) in members and not torch.equal(members[name, side].index, index):
            raise UnsupportedModel(f"{name} meets these channels in two different orders")
        members[name, side] = Member(name, side, index, _size(module, side))  # type: ignore[arg-type]
    group = Group(root, units, tuple(members.values()))
    if not group.consumers:
        raise UnsupportedModel("its channels are the network's output")
    return tie_positions(group, parts) if parts > 1 else group


def _size(module: nn.Module, side: str) -> int:
    """The length of the dimension: of the weight's rows, or of the columns of all convolution groups together."""
    weight = module.weight if isinstance(module.weight, Tensor) else module.running_mean
    assert isinstance(weight, Tensor)
    return weight.shape[1] * getattr(module, "groups", 1) if side == "in" else weight.shape[0]


def _index(name: str, indices: list[int], roots: list[int], units: int) -> Tensor:
    """[units, k]: the channels of this layer that belong to each channel of the root."""
    order = sorted(zip(roots, indices, strict=True))
    counts = torch.bincount(torch.tensor([r for r, _ in order]), minlength=units)
    if len(counts) != units or counts.min() != counts.max():
        raise UnsupportedModel(f"{name} does not use every channel equally often")
    return torch.tensor([i for _, i in order]).view(units, -1)


def _without_overlaps(structure: Structure) -> Structure:
    """Freeze groups that claim the same channel of the same layer twice (their removal would not be independent)."""
    claimed: dict[tuple[str, str], tuple[str, set[int]]] = {}
    bad: dict[str, str] = {}
    for group in structure.groups:
        for member in group.members:
            for side in ("in", "out") if member.side == "tied" else (member.side,):
                mine = set(member.index.flatten().tolist())
                other, taken = claimed.setdefault((member.layer, side), (group.name, set()))
                if len(mine) != member.index.numel() or mine & taken:
                    why = f"{member.layer} uses its channels in more than one way"
                    bad |= dict.fromkeys((group.name, other), why)
                taken |= mine
    return structure.without(bad) if bad else structure


def tie_positions(group: Group, parts: int) -> Group:
    """Tie the channels at the same position in each of ``parts`` equal blocks (what a convolution with
    ``groups=parts`` needs).
    """
    if group.units % parts:
        raise UnsupportedModel(f"{group.name}: {group.units} channels do not split into {parts} convolution groups")
    size = group.units // parts

    def tied(index: Tensor) -> Tensor:
        return index.view(parts, size, -1).transpose(0, 1).reshape(size, -1)

    return replace(group, units=size, members=tuple(replace(m, index=tied(m.index)) for m in group.members))
