"""What can be pruned in a network: groups of channels that must go together, and the layers whose size they set.

Nothing here changes a model.

One description serves plain chains (every group has one producer) and networks with residuals (a stream is one
group), so that free and coupled pruning are compared with the same importance, limits, schedule and surgery.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.inputs import Inputs, as_tuple
from rmprune.graph.run import evaluating, on_copies
from rmprune.graph.tensors import tensors_in
from rmprune.pruning.layers import Cost, SizedLayer, macs, price
from rmprune.pruning.layers import weight_of as weight_of  # its name of before

MemberSide = Literal["out", "in", "tied", "size", "zero"]
Keep = dict[str, Tensor]
"""Group name -> bool [units]; True is what stays. A group that is absent stays whole."""


@dataclass(frozen=True)
class Member:
    """One tensor dimension that shrinks with a group. `index` [units, k]: the channels of `layer` that unit u
    owns, out of `size`.

    `side`: "out" (a convolution's or linear layer's outputs), "in" (its inputs), "tied" (both at once: batch norm,
    PReLU, depthwise); beside those of layers "size" (`layer` is a place where code writes how many there are, see
    `rmprune.pruning.written_sizes`) and "zero" (outputs that meet others of the group in a product that is added over: without them those
    are read by nobody). `fan`: outputs for each input of a depthwise layer; `index` and `size` are those of its outputs.
    """

    layer: str
    side: MemberSide
    index: Tensor
    size: int
    fan: int = 1


@dataclass(frozen=True)
class Group:
    """Channels that go together. `units`: how many can be decided on; each is `multiple` channels of a producer
    (1 but for grouped convolutions, where the same position in every convolution group goes at once). `beside`: what is no dimension
    of a layer, of the sides "size" and "zero".
    """

    name: str
    units: int
    members: tuple[Member, ...]
    beside: tuple[Member, ...] = ()

    @property
    def paired(self) -> bool:
        """Whether its channels meet each other in a product that is added over, as those of queries and keys do."""
        return len(self.readers) > len(self.consumers)

    @property
    def multiple(self) -> int:
        """Channels of the producing layer that one unit stands for."""
        return next(int(m.index.shape[1]) for m in self.members if m.side == "out")

    @property
    def channels(self) -> int:
        """Output channels of layers that one unit stands for, over all producers: the unit of `Budget.ratio`."""
        return sum(int(m.index.shape[1]) for m in self.members if m.side == "out")

    @property
    def producers(self) -> tuple[str, ...]:
        """Layers whose outputs these channels are (more than one: a residual stream)."""
        return tuple(m.layer for m in self.members if m.side == "out")

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members that read these channels."""
        return tuple(m for m in self.members if m.side == "in")

    @property
    def readers(self) -> tuple[Member, ...]:
        """The consumers, and the outputs that read the others in a product (side "zero"): where the channels have their effect."""
        return self.consumers + tuple(m for m in self.beside if m.side == "zero")


def outputs(model: nn.Module, example_inputs: Inputs) -> list[Tensor]:
    """All tensors that the model returns, in eval mode and on its device: of one, a tuple, a dict, ..."""
    with evaluating(model), torch.no_grad():
        return tensors_in(on_copies(model, *as_tuple(model, example_inputs)))


@dataclass(frozen=True)
class Structure:
    """Groups, the layers they size, and `frozen`: {group or layer: why it is not pruned}."""

    groups: tuple[Group, ...]
    layers: tuple[SizedLayer, ...]
    frozen: Mapping[str, str]

    @property
    def units(self) -> dict[str, int]:
        """{group: how many units it has}."""
        return {g.name: g.units for g in self.groups}

    def group(self, name: str) -> Group:
        """The group of this name."""
        return next(g for g in self.groups if g.name == name)

    def without(self, reasons: Mapping[str, str]) -> "Structure":
        """The same network with the named groups left whole."""
        groups = tuple(g for g in self.groups if g.name not in reasons)
        return with_ports(Structure(groups, self.layers, {**self.frozen, **reasons}))

    def shrunk(self, keep: Mapping[str, Tensor]) -> "Structure":
        """The description of the network that `rmprune.pruning.surgery.shrink` returns for the same `keep`."""
        masks = layer_masks(self, keep)
        groups = tuple(_shrink_group(g, keep.get(g.name), masks) for g in self.groups)
        layers = []
        for layer in self.layers:
            rows, cols = masks.get((layer.name, "out")), masks.get((layer.name, "in"))
            cout = layer.cout if rows is None else int(rows.sum())
            cin = layer.cin if cols is None else int(cols.sum())
            groups_now = cin if layer.kind == "depthwise" else layer.groups
            layers.append(replace(layer, cin=cin, cout=cout, groups=groups_now))
        return Structure(groups, tuple(layers), self.frozen)


def total_cost(structure: Structure, cost: Cost = macs) -> float:
    """The cost of the whole network as it is."""
    return sum(price(cost, layer, layer.cin, layer.cout) for layer in structure.layers)


def mask_of(size: int, index: Tensor) -> Tensor:
    """Bool mask [size] on the CPU, True at these indices."""
    return torch.zeros(size, dtype=torch.bool).index_fill(0, index.cpu(), True)


def layer_masks(structure: Structure, keep: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """{(layer or place, "out", "in", "size" or "zero"): bool mask over its channels}, for everything that loses something or could.
    Checks `keep`. Raises UnsupportedModel for unknown groups, other shapes, and groups that lose everything.
    """
    units = structure.units
    for name, mask in keep.items():
        if name not in units:
            raise UnsupportedModel(
                f"keep names {name!r}, which is no prunable group here; there are: {', '.join(units)}"
            )
        if mask.dtype != torch.bool or mask.shape != (units[name],):
            raise UnsupportedModel(
                f"keep[{name!r}]: expected a bool mask of {units[name]}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if not mask.any():
            raise UnsupportedModel(f"keep[{name!r}] removes every channel; leave at least one")
    masks: dict[tuple[str, str], Tensor] = {}
    for group in structure.groups:
        gone = ~keep[group.name].cpu() if group.name in keep else None
        for member in (*group.members, *group.beside):
            for side in ("out", "in") if member.side == "tied" else (member.side,):
                fan = member.fan if side == "in" else 1
                mask = masks.setdefault((member.layer, side), torch.ones(member.size // fan, dtype=torch.bool))
                if gone is not None:
                    mask[member.index[gone, ::fan].flatten() // fan] = False
    return masks


def _shrink_group(group: Group, keep: Tensor | None, masks: Mapping[tuple[str, str], Tensor]) -> Group:
    def shrunk(member: Member) -> Member:
        mask = masks[(member.layer, "out" if member.side == "tied" else member.side)]
        renumber = mask.cumsum(0) - 1
        index = member.index if keep is None else member.index[keep.cpu()]
        return replace(member, index=renumber[index], size=int(mask.sum()))

    units = group.units if keep is None else int(keep.sum())
    members, beside = (tuple(map(shrunk, found)) for found in (group.members, group.beside))
    return replace(group, units=units, members=members, beside=beside)


def with_ports(structure: Structure) -> Structure:
    """Fill in each layer's `inputs` and `outputs` from the groups."""
    inputs: dict[str, list[tuple[str, int]]] = {}
    outputs: dict[str, list[tuple[str, int]]] = {}
    for group in structure.groups:
        for member in group.members:
            width = int(member.index.shape[1])
            if member.side in ("out", "tied"):
                outputs.setdefault(member.layer, []).append((group.name, width))
            if member.side in ("in", "tied"):
                inputs.setdefault(member.layer, []).append((group.name, width // member.fan))
    layers = (
        replace(x, inputs=tuple(inputs.get(x.name, ())), outputs=tuple(outputs.get(x.name, ())))
        for x in structure.layers
    )
    return Structure(structure.groups, tuple(layers), structure.frozen)


def inner_only(structure: Structure) -> Structure:
    """Only channels inside blocks may go, as in ThiNet: every group that several layers add into (a residual stream) is left whole."""
    return structure.without({g.name: "a residual stream" for g in structure.groups if len(g.producers) > 1})


Scores = dict[str, Tensor]
"""Group name -> float64 [units]."""


def member_values(values: Tensor, member: Member) -> Tensor:
    """[units, k] of a vector over the channels of the member's layer."""
    return values.double().cpu()[member.index]


def zero_scores(structure: Structure, device: torch.device | None = None) -> Scores:
    """A score of 0 for every unit."""
    return {g.name: torch.zeros(g.units, dtype=torch.float64, device=device) for g in structure.groups}
