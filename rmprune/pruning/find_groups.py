"""The prunable groups of a network, read from the labels of its normalised graph."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from rmprune.errors import UnsupportedModel
from rmprune.graph.inputs import Inputs
from rmprune.graph.network import in_words
from rmprune.graph.tensors import own_tensors, tensors_in
from rmprune.pruning.follow import Walk
from rmprune.pruning.groups import Group, Member, Structure, with_ports
from rmprune.pruning.labelled import along
from rmprune.pruning.labels import compact, select, thin, varying
from rmprune.pruning.layers import Weighted, sized_layers
from rmprune.pruning.reading import Reading, read
from rmprune.pruning.training_only import read_in_training
from rmprune.pruning.written_sizes import put

CUTS = 6  # that operations are tried with


class NothingToPrune(UnsupportedModel):
    """No channel can go."""


def find_structure(model: nn.Module, example_inputs: Inputs, *, reading: Reading | None = None) -> Structure:
    """The groups of channels that can go, the layers they size, and what cannot be pruned and why.

    `example_inputs`: images [N, ...], of which the first is looked at. `reading`: the network as `read` has it, where that is at
    hand. Operations that channels pass through are tried with some of them gone: what is written for their number stays whole.
    Raises UnsupportedModel where torch.fx cannot follow the network, or nothing can be pruned.
    """
    reading = reading or read(model, example_inputs)
    walk = Walk(reading, _unsliceable(model))
    groups = _alike(walk)
    while groups and (node := _misfit(walk, groups)) is not None:
        _leave(walk, node)
        groups = _alike(walk)
    frozen = {}
    for (layer, side), labels in walk.members.items():
        why = walk.channels.why(labels) if side == "out" else None
        if why is not None:
            frozen[layer] = why
    frozen |= walk.whole
    found = _named(groups, walk)
    layers = sized_layers(model, example_inputs, walk.shapes)
    structure = with_ports(Structure(found, layers, frozen))
    structure = structure.without(read_in_training(model, structure, reading))
    if not structure.groups:
        alone = isinstance(model, Weighted) and "it is one layer, whose channels are the output"
        reasons = alone or "; ".join(f"{name}: {why}" for name, why in structure.frozen.items())
        raise NothingToPrune(
            f"{type(model).__name__}: no channel can be pruned ({reasons or 'no convolution or linear layer'})"
        )
    return structure


def _unsliceable(model: nn.Module) -> dict[str, str]:
    """{module: why its tensors cannot be cut}: weights that are computed, or that several modules share."""
    found: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for kind in ("weight", "bias"):
            if isinstance(getattr(module, kind, None), Tensor) and kind not in (*module._parameters, *module._buffers):
                found[name] = f"its {kind} is computed from other tensors; make it permanent to have it pruned"
        for _, tensor in own_tensors(module):
            other = owners.setdefault(id(tensor), name)
            if other != name:
                found[name], found[other] = f"it shares a tensor with {other}", f"it shares a tensor with {name}"
    return found


@dataclass(frozen=True)
class _Alike:
    """Channels that the same members have, each as often: roots [units], one for each unit."""

    roots: Tensor
    members: tuple[Member, ...]
    beside: tuple[Member, ...]


def _alike(walk: Walk) -> list[_Alike]:
    root = walk.channels.root
    members = [(layer, side, root[labels]) for (layer, side), labels in walk.members.items()]
    having: dict[int, list[tuple[int, int]]] = {}
    for number, (_, _, roots) in enumerate(members):
        for one, count in zip(*(x.tolist() for x in roots.unique(return_counts=True)), strict=True):
            having.setdefault(one, []).append((number, count))
    having.pop(0, None)
    same: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for one in sorted(having):
        same.setdefault(tuple(having[one]), []).append(one)
    found = []
    for having_it, units in same.items():
        rank = torch.full((len(root),), -1).index_copy(0, torch.tensor(units), torch.arange(len(units)))
        if not any(members[number][1] in ("in", "zero") for number, _ in having_it):
            walk.channels.stay(torch.tensor(units), "no layer that can be cut reads its channels")
            continue
        own = []
        for number, count in having_it:
            layer, side, roots = members[number]
            place = rank[roots].argsort(stable=True)[-count * len(units) :]
            fan = walk.fans.get(layer, 1)
            own.append(Member(layer, side, place.view(-1, count), len(roots), fan))
        apart = [tuple(m for m in own if (m.side in ("size", "zero")) == beside) for beside in (False, True)]
        found.append(_Alike(torch.tensor(units), *apart))
    return found


def _misfit(walk: Walk, groups: Sequence[_Alike]) -> fx.Node | None:
    """An operation that goes wrong when channels of these groups are cut, by a few cuts; None where all is well.

    The first takes the first channels of all groups, the next the last ones, so that halves lose unequally; then it is chance.
    """
    chance, tried = torch.Generator().manual_seed(0), _Tried(walk)
    for cut in range(CUTS):
        gone = torch.zeros(len(walk.channels.root), dtype=torch.bool)
        for group in groups:
            units = len(group.roots)
            order = torch.randperm(units, generator=chance)
            count = int(torch.randint(units, (1,), generator=chance))
            some = min(max(1, units // 3), units - 1)
            ends = (torch.arange(some), torch.arange(units - some, units))
            gone[group.roots[ends[cut] if cut < 2 else order[:count]]] = True
        node = _first_misfit(tried, gone)
        if node is not None:
            return node
    return None


class _Tried:
    """What is the same for every cut, by node: the labels of its value as they are now, and what a move reads and gives whole.

    A move is run on places, numbered along the dimensions that have channels: a unit's channels have one label, but an order, too.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk, self.moves = walk, set(walk.moves)
        self.labels = {
            node: [walk.again(x) for x in tensors_in(walk.values[node])]
            for node in walk.network.graph.nodes
            if node.op != "output"
        }
        self._places: dict[fx.Node, dict[fx.Node, Any]] = {}
        self._given: dict[fx.Node, Any] = {}

    def places(self, node: fx.Node) -> dict[fx.Node, Any]:
        if node not in self._places:
            sources, numbers = node.all_input_nodes, itertools.count(1)
            dims = {dim for n in sources for x in self.labels[n] for dim in varying(x)}
            self._places[node] = {n: _places(self.walk.values[n], dims, numbers) for n in sources}
        return self._places[node]

    def given(self, node: fx.Node) -> Any:
        if node not in self._given:
            places = {n: _without(x, [None] * len(tensors_in(x))) for n, x in self.places(node).items()}
            self._given[node] = _run(self.walk, node, places)
        return self._given[node]


def _first_misfit(tried: _Tried, gone: Tensor) -> fx.Node | None:
    """The first operation that, run without the channels `gone` (bool, by root), does not give its result without them."""
    sizes: dict[fx.Node, Any] = {}  # those of the smaller network
    slices: dict[fx.Node, list[tuple[int, Tensor] | None]] = {}
    for node, labels in tried.labels.items():
        try:
            slices[node] = [_slice(x, gone) for x in labels]
            if node in tried.moves:
                places = tried.places(node).items()
                cut = {n: sizes[n] if n in sizes else _without(x, slices[n]) for n, x in places}
                found = _run(tried.walk, node, cut, gone)
                if not labels:
                    sizes[node] = found
                elif not _same(found, _without(tried.given(node), slices[node])):
                    return node
        except (RuntimeError, ValueError, IndexError, TypeError):
            return node
    return None


def _run(walk: Walk, node: fx.Node, values: Mapping[fx.Node, Any], gone: Tensor | None = None) -> Any:
    """A move on these values, with the sizes that are written there as they are without the channels `gone`."""
    args = node.args
    for path, labels in walk.sizes.get(node, ()) if gone is not None else ():
        assert gone is not None
        args = put(args, path, int((~gone[walk.channels.root[labels]]).sum()))
    args, kwargs = fx.map_arg((args, node.kwargs), lambda n: values[n])
    return walk.run(node, args, kwargs)


def _places(values: Any, dims: set[int], numbers: Iterator[int]) -> Any:
    """In the place of each tensor in `values` numbers of its own, one for each place along these dimensions."""

    def numbered(x: Tensor) -> Tensor:
        shape = [size if dim in dims else 1 for dim, size in enumerate(x.shape)]
        own = torch.tensor(list(itertools.islice(numbers, math.prod(shape))), dtype=torch.int64)
        return own.view(shape).expand(x.shape)

    return tree_map_only(Tensor, numbered, values)


def _slice(labels: Tensor, gone: Tensor) -> tuple[int, Tensor] | None:
    """The dimension along which labels go, and which places of it stay (bool); None where none goes."""
    mask = compact(gone[thin(labels)].expand(labels.shape))
    dims = varying(mask)
    if not dims and not bool(mask.any()):
        return None
    if len(dims) != 1:
        raise ValueError("the channels that go are no slices of one dimension")
    return dims[0], ~along(mask, dims[0])


def _without(values: Any, slices: list[tuple[int, Tensor] | None]) -> Any:
    """The tensors in `values`, each without what goes of it."""
    of = iter(slices)

    def cut(x: Tensor) -> Tensor:
        own = next(of)
        return x.view_as(x) if own is None else select(x, *own)  # a move in place may give it another shape

    return cut(values) if isinstance(values, Tensor) else tree_map_only(Tensor, cut, values)


def _same(found: Any, wanted: Any) -> bool:
    first, second = tensors_in(found), tensors_in(wanted)
    return len(first) == len(second) and all(
        a.shape == b.shape and bool((thin(compact(a)) == thin(compact(b))).all())
        for a, b in zip(first, second, strict=True)
    )


def _leave(walk: Walk, node: fx.Node) -> None:
    """Leave whole what a misfit touches: its result, or else what it reads, or whose sizes it does, or else everything."""
    why = f"{in_words(walk.network, node)} is written for this number of channels"
    read_by_it = [walk.values[n] for n in node.all_input_nodes]
    for values in (walk.values[node], read_by_it, _measured(walk, node), torch.arange(len(walk.channels.root))):
        if max((walk.channels.stay(x, why) for x in tensors_in(values)), default=False):
            return


def _measured(walk: Walk, node: fx.Node) -> list[Any]:
    """The values whose sizes an operation reads."""
    found = []
    for source in node.all_input_nodes:
        if not tensors_in(walk.values[source]):
            found += [walk.values[n] for n in source.all_input_nodes] + _measured(walk, source)
    return found


def _named(groups: Sequence[_Alike], walk: Walk) -> tuple[Group, ...]:
    """The groups, each under the name of the first layer that puts its channels out, in the order of these layers.

    Records and checkpoints go by names and order: those of the network from front to back where it is a chain, else from its
    outputs back, the last input of each operation first. What is left of a layer whose channels go different ways is `name[channel]`.
    """
    order = {walk.layers[node]: i for i, node in enumerate(_order(walk.network.graph)) if node in walk.layers}
    firsts = []
    for group in groups:
        own = [m for m in group.members if m.side == "out" or (m.side == "tied" and m.layer in order)]
        first = min(own, key=lambda m: order[m.layer])
        firsts.append((order[first.layer], int(first.index.min()), first.layer, group))
    named: dict[str, Group] = {}
    for _, channel, layer, group in sorted(firsts, key=lambda x: x[:2]):
        name = f"{layer}[{channel}]" if layer in named else layer
        named[name] = Group(name, len(group.roots), group.members, group.beside)
    return tuple(named.values())


def _order(graph: fx.Graph) -> list[fx.Node]:
    nodes = list(graph.nodes)
    if all(node.all_input_nodes == [before] for before, node in itertools.pairwise(nodes)):
        return nodes
    found: dict[fx.Node, None] = {}
    visited: set[fx.Node] = set()
    stack: list[fx.Node] = []
    for output in nodes[-1].all_input_nodes:
        found.setdefault(output)
        stack.append(output)
        while stack:
            node = stack.pop()
            if node not in visited:
                visited.add(node)
                found.update(dict.fromkeys(n for n in node.all_input_nodes if n not in found))
                stack.extend(node.all_input_nodes)
    return [*found, *(node for node in nodes if node not in found)]  # the last are read by nobody
