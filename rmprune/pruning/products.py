"""Channels through products of maps: matrix products, einsum, attention. What is no product is `follow`'s affair."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from rmprune.graph.network import in_words, is_batch_norm, shape_of
from rmprune.graph.tensors import tensors_in
from rmprune.pruning.labelled import Labelled, along
from rmprune.pruning.labels import compact, nobody, varying
from rmprune.pruning.operations import LIKE, LINEAR, operation


def multiplied(walk: Labelled, node: fx.Node, name: str, labels: list[Tensor], terms: list[str], result: str) -> Tensor:
    """A product of maps: channels along a dimension that it keeps go through, those that it adds over go together, or stay."""
    shape, words = shape_of(node), in_words(walk.network, node)
    assert shape is not None
    found: dict[str, list[Tensor]] = {}
    for x, letters in zip(labels, terms, strict=True):
        for dim, letter in enumerate(letters):
            own = along(x, dim) if dim in varying(x) else nobody(x.shape[dim : dim + 1])
            found.setdefault(letter, []).append(own)
    added = {
        letter for x, letters in zip(labels, terms, strict=True) for d, letter in enumerate(letters) if d in varying(x)
    }
    if added - set(result) and not _met(walk, node, name, labels, terms, added - set(result)):
        for x, letters in zip(labels, terms, strict=True):
            if {letters[d] for d in varying(x)} - set(result):
                walk.channels.stay(x, f"{words} adds over them")
    kept = [letter for letter in result if any(bool(walk.channels.root[x].any()) for x in found[letter])]
    for letter in kept[1:]:
        for x in found[letter]:
            walk.channels.stay(x, f"{words} pairs them with other channels")
    if not kept:
        return nobody(shape)
    first, *others = found[kept[0]]
    for x in others:
        if len(x) == len(first):  # one for all: a mask of attention
            walk.channels.unite(first, x, "they meet channels that stay whole")
    place = result.index(kept[0])
    return walk.again(first.view(-1, *(1,) * (len(shape) - place - 1)).expand(shape))


def _met(walk: Labelled, node: fx.Node, name: str, labels: list[Tensor], terms: list[str], added: set[str]) -> bool:
    """Two factors whose channels meet, place by place, and are added over, as those of queries and keys: they go together, where the
    one factor's are rows of a layer, and nothing but moves and numbers to multiply by lies between.
    """
    sources = [n for n in node.all_input_nodes if tensors_in(walk.values[n])]
    if len(added) != 1 or len(sources) != len(labels):
        return False
    (letter,) = added
    two = [i for i, letters in enumerate(terms) if letter in letters]
    if len(two) != 2 or any(varying(labels[i]) != [terms[i].index(letter)] for i in two):
        return False
    scale = node.kwargs.get("scale")
    scaled = name == "scaleddotproductattention" and scale is None  # by what is cut
    if scaled and not walk.is_written(node):
        return False
    of = next(((i, rows) for i in reversed(two) if (rows := _rows(walk, sources[i])) is not None), None)
    if of is None:
        return False
    first, second = (along(labels[i], terms[i].index(letter)) for i in two)
    walk.channels.unite(first, second, "they meet channels that stay whole")
    (layer, rows), x = of[1], labels[of[0]]
    for d in set(range(x.dim())) - set(varying(rows)):
        rows, x = rows.narrow(d, 0, 1), x.narrow(d, 0, 1)
    known = walk.members.setdefault((layer, "zero"), torch.zeros(walk.outputs(layer), dtype=torch.int64))
    known[rows.flatten()] = x.expand_as(rows).flatten()
    if scaled:
        walk.written(node, "scale", first)
    return True


def _rows(walk: Labelled, node: fx.Node) -> tuple[str, Any] | None:
    """(layer, which of its outputs each element of a value is), where nothing but moves and numbers to multiply by lies between."""
    layer, x = walk.network.layer(node), walk.values[node]
    name = walk.layers.get(node) or (walk.reading.name(node) if is_batch_norm(layer) else None)
    if name is not None and isinstance(x, Tensor):
        dim = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
        return name, torch.arange(x.shape[dim]).view(-1, *(1,) * (x.dim() - dim - 1)).expand(x.shape)
    sources = [n for n in node.all_input_nodes if tensors_in(walk.values[n])]
    first = len(sources) == 1 or (sources and operation(node, walk.network) in LIKE)
    before = _rows(walk, sources[0]) if first and sources[0] is node.all_input_nodes[0] else None
    if before is None or operation(node, walk.network) in LINEAR:
        return before
    if node not in walk.moves:
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: before[1] if n is sources[0] else walk.values[n])
    return before[0], tree_map_only(Tensor, compact, walk.run(node, args, kwargs))
