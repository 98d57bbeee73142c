"""Which channel each element of each value belongs to, followed through a normalised graph. `find_groups` makes groups of it.

A layer numbers its output channels anew; operations that only move data are run on the numbers themselves; sums of two maps tie
the channels that meet; whatever is unknown, or needs channels in their number or order, leaves those it touches whole, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from rmprune.graph.network import in_words, is_batch_norm, shape_of
from rmprune.pruning.groups import MemberSide
from rmprune.pruning.labels import Channels, compact, nobody, tensors_in, thin, varying
from rmprune.pruning.layers import Weighted, channels_read, in_and_out, is_depthwise, rank_read
from rmprune.pruning.operations import (
    ALONG,
    ELEMENTWISE,
    INDEXING,
    LIKE,
    LINEAR,
    MOVES,
    REDUCTIONS,
    SPATIAL,
    batched,
    operation,
    product,
)
from rmprune.pruning.reading import Reading
from rmprune.pruning.written import places


class Walk:
    """The labels of every value, and who has which: `members` {(layer, "out" | "in" | "tied"): labels of its channels}.

    `whole`: {module: why it cannot be sliced}.
    """

    def __init__(self, reading: Reading, whole: Mapping[str, str]) -> None:
        self.reading, self.network, self.whole = reading, reading.network, dict(whole)
        self.apart = {reading.owners.get(id(tensor)) for tensor in reading.network.constants.values()}
        self.channels = Channels()
        self.members: dict[tuple[str, MemberSide], Tensor] = {}
        self.layers: dict[fx.Node, str] = {}  # convolutions and linear layers; their input and output shapes
        self.shapes: dict[str, tuple[Size, Size]] = {}
        self.fans: dict[str, int] = {}  # of depthwise layers: outputs for each input
        self.values: dict[fx.Node, Any] = {}
        self.moves: list[fx.Node] = []  # and what only computes sizes
        self.sizes: dict[
            fx.Node, list[tuple[str, Tensor]]
        ] = {}  # where code writes how many there are: of which channels
        for node in self.network.graph.nodes:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda n: tree_map_only(Tensor, self.again, self.values[n])
            )
            labels = tensors_in((args, kwargs))
            found = self._value(node, args, kwargs, labels)
            if isinstance(found, Tensor) and tuple(found.shape) != shape_of(node):
                found = self._unknown(node, labels)
            self.values[node] = found

    def _value(self, node: fx.Node, args: Any, kwargs: Any, labels: list[Tensor]) -> Any:
        if node.op == "output":
            many = len(labels) > 1
            why = "its channels are among the network's outputs" if many else "its channels are the network's output"
            return self._fenced(labels, why)
        if node.op in ("placeholder", "get_attr"):
            shape = shape_of(node)
            return self.network.constants.get(str(node.target)) if shape is None else nobody(shape)
        if not labels and node.op != "call_module":
            self.moves.append(node)
            return tree_map_only(Tensor, lambda x: nobody(x.shape), self.run(node, args, kwargs))
        layer, name = self.network.layer(node), operation(node, self.network)
        if isinstance(layer, nn.Module):
            found = self._layer(node, layer, labels)
            if found is not None:
                return found
        if name in ELEMENTWISE and shape_of(node) is not None:
            return self._joined(node, labels)
        if name in MOVES and (name not in INDEXING or not tensors_in((args[1:], kwargs))):
            return self._moved(node, args, kwargs, name)
        if len(labels) == 1 and name in REDUCTIONS:
            return self._reduced(node, args, kwargs)
        if len(labels) == 1 and name in SPATIAL and batched(name, labels[0].dim()):
            return self._spatial(node, labels[0])
        if len(labels) == 1 and name == "pad":
            return self._padded(node, args, kwargs)
        if len(labels) == 1 and name in ALONG and shape_of(node) == labels[0].shape:
            dim = layer.dim if isinstance(layer, nn.Module) else args[1] if len(args) > 1 else kwargs.get("dim")
            if isinstance(dim, int) and dim % labels[0].dim() not in varying(labels[0]):
                return labels[0]
        letters = product(name, args, labels)
        return self._unknown(node, labels) if letters is None else self._multiplied(node, name, labels, *letters)

    # Layers

    def _layer(self, node: fx.Node, layer: nn.Module, labels: list[Tensor]) -> Any:
        """What a layer with tensors of its own makes of its input; None for one that has none but a number."""
        name, size = self.reading.owner(layer) or self.reading.owners.get(id(layer)), channels_read(layer)
        if size is None and not any(t.numel() > 1 for t in (*layer.parameters(), *layer.buffers())):
            return None
        if name is None:
            return self._unknown(node, labels, "a free-standing parameter has these channels")
        if isinstance(layer, Weighted):
            self._note(node, name, labels)
        if name in self.apart:
            self.whole.setdefault(name, "code reads its tensors beside it")
        if name in self.whole:
            return self._unknown(node, labels, f"{name}: {self.whole[name]}")
        if isinstance(layer, nn.LayerNorm) and len(labels) == 1:
            x = labels[0]
            if max(varying(x), default=0) < x.dim() - len(layer.normalized_shape):  # each channel for itself
                return x
        if size is None or len(labels) != 1:
            kind = type(layer).__name__
            if any(t.dim() > 1 for t in layer.parameters()):
                self.whole[name] = f"layers of type {kind} are not pruned"
            does = "normalises over channels" if "Norm" in kind else "has these channels and cannot be sliced"
            return self._unknown(node, labels, f"{name} ({kind}) {does}")
        x = labels[0]
        dim, rank = x.dim() - 1 if isinstance(layer, nn.Linear) else 1, rank_read(layer)
        if x.dim() != (rank or max(x.dim(), 2)) or x.shape[dim] != size or set(varying(x)) - {dim}:
            self.channels.stay(x, f"{name} reads its channels as positions")
            x = nobody(x.shape)
        vector = x[tuple(slice(None) if d == dim else 0 for d in range(x.dim()))]
        if isinstance(layer, Weighted):
            return self._weighted(node, name, layer, vector)
        if isinstance(layer, nn.GroupNorm):
            self._same_place(vector.view(layer.num_groups, -1).T, f"{name} normalises over channels that stay")
        self._member(name, "tied", vector)
        return self.again(x)

    def _weighted(self, node: fx.Node, name: str, layer: Weighted, vector: Tensor) -> Tensor:
        after = shape_of(node)
        assert after is not None
        if is_depthwise(layer):
            self.fans[name] = layer.out_channels // len(vector)  # type: ignore[operator, assignment]
            vector = vector.repeat_interleave(self.fans[name])
            self._member(name, "tied", vector)
            out = self.channels.root[vector]
        else:
            self._member(name, "in", vector)
            out = self.channels.new(in_and_out(layer)[1])
            self._member(name, "out", out)
            groups = getattr(layer, "groups", 1)
            for side in (vector, out) if groups > 1 else ():  # the same position of every convolution group
                self._same_place(
                    side.view(groups, -1), f"{name}, a grouped convolution, reads channels that stay beside them"
                )
            out = self.channels.root[out]
        ends = (1,) * (len(after) - 2)
        return compact((out if isinstance(layer, nn.Linear) else out.view(-1, *ends)).expand(after))

    def _same_place(self, parts: Tensor, why: str) -> None:
        """Channels at the same place of each part [parts, places] go together."""
        self.channels.unite(parts[:1].expand_as(parts), parts, why)

    def _note(self, node: fx.Node, name: str, labels: list[Tensor]) -> None:
        if name in self.shapes:
            self.whole.setdefault(name, "it is used twice in one forward pass")
            for (layer, _), own in self.members.items():
                if layer == name:
                    self.channels.stay(own, f"{name} is used twice in one forward pass")
            return
        self.layers[node], self.shapes[name] = name, (labels[0].shape, Size(shape_of(node) or ()))

    def _member(self, name: str, side: MemberSide, vector: Tensor) -> None:
        known = self.members.setdefault((name, side), vector)
        if known is not vector:
            self.channels.unite(known, vector, f"{name}, which is used twice, has channels that stay beside them")

    # Other operations

    def _joined(self, node: fx.Node, labels: list[Tensor]) -> Tensor:
        """Elementwise: where two values meet, their channels go together."""
        shape = shape_of(node)
        assert shape is not None
        free = any(n.op == "get_attr" for n in node.all_input_nodes)
        why = "a free-standing parameter has these channels" if free else "they meet channels that stay whole"
        padded = [x[(None,) * (len(shape) - x.dim())] for x in labels]
        kept = []
        for x in padded:  # one value for all channels of another: it can neither be tied to them nor go
            across = {d for y in padded for d in varying(y)}
            if any(x.shape[d] == 1 != shape[d] for d in across):
                self.channels.stay(x, f"{in_words(self.network, node)} spreads them over other channels")
            else:
                kept.append(x.expand(shape))
        found = compact(kept[0]) if kept else nobody(shape)
        for x in kept[1:]:
            first, second = found, x
            for dim in range(len(shape)):
                if shape[dim] > 1 and first.stride(dim) == second.stride(dim) == 0:
                    first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
            self.channels.unite(first, second, why)
        return self.again(found)

    def _multiplied(self, node: fx.Node, name: str, labels: list[Tensor], terms: list[str], result: str) -> Tensor:
        """A product of maps: channels along a dimension that it keeps go through, those that it adds over go together, or stay."""
        shape, words = shape_of(node), in_words(self.network, node)
        assert shape is not None
        along: dict[str, list[Tensor]] = {}
        for x, letters in zip(labels, terms, strict=True):
            for dim, letter in enumerate(letters):
                own = _along(x, dim) if dim in varying(x) else nobody(x.shape[dim : dim + 1])
                along.setdefault(letter, []).append(own)
        added = {
            letter
            for x, letters in zip(labels, terms, strict=True)
            for d, letter in enumerate(letters)
            if d in varying(x)
        }
        if added - set(result) and not self._met(node, name, labels, terms, added - set(result)):
            for x, letters in zip(labels, terms, strict=True):
                if {letters[d] for d in varying(x)} - set(result):
                    self.channels.stay(x, f"{words} adds over them")
        kept = [letter for letter in result if any(bool(self.channels.root[x].any()) for x in along[letter])]
        for letter in kept[1:]:
            for x in along[letter]:
                self.channels.stay(x, f"{words} pairs them with other channels")
        if not kept:
            return nobody(shape)
        first, *others = along[kept[0]]
        for x in others:
            if len(x) == len(first):  # one for all: a mask of attention
                self.channels.unite(first, x, "they meet channels that stay whole")
        place = result.index(kept[0])
        return self.again(first.view(-1, *(1,) * (len(shape) - place - 1)).expand(shape))

    def _met(self, node: fx.Node, name: str, labels: list[Tensor], terms: list[str], added: set[str]) -> bool:
        """Two factors whose channels meet, place by place, and are added over, as those of queries and keys: they go together, where the
        one factor's are rows of a layer, and nothing but moves and numbers to multiply by lies between.
        """
        sources = [n for n in node.all_input_nodes if tensors_in(self.values[n])]
        if len(added) != 1 or len(sources) != len(labels):
            return False
        (letter,) = added
        two = [i for i, letters in enumerate(terms) if letter in letters]
        if len(two) != 2 or any(varying(labels[i]) != [terms[i].index(letter)] for i in two):
            return False
        scale = node.kwargs.get("scale")
        scaled = name == "scaleddotproductattention" and scale is None  # by what is cut
        if scaled and not self._is_written(node):
            return False
        of = next(((i, rows) for i in reversed(two) if (rows := self._rows(sources[i])) is not None), None)
        if of is None:
            return False
        first, second = (_along(labels[i], terms[i].index(letter)) for i in two)
        self.channels.unite(first, second, "they meet channels that stay whole")
        (layer, rows), x = of[1], labels[of[0]]
        for d in set(range(x.dim())) - set(varying(rows)):
            rows, x = rows.narrow(d, 0, 1), x.narrow(d, 0, 1)
        known = self.members.setdefault((layer, "zero"), torch.zeros(self._outputs(layer), dtype=torch.int64))
        known[rows.flatten()] = x.expand_as(rows).flatten()
        if scaled:
            self._written(node, "scale", first)
        return True

    def _rows(self, node: fx.Node) -> tuple[str, Any] | None:
        """(layer, which of its outputs each element of a value is), where nothing but moves and numbers to multiply by lies between."""
        layer, x = self.network.layer(node), self.values[node]
        name = self.layers.get(node) or (self.reading.name(node) if is_batch_norm(layer) else None)
        if name is not None and isinstance(x, Tensor):
            dim = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
            return name, torch.arange(x.shape[dim]).view(-1, *(1,) * (x.dim() - dim - 1)).expand(x.shape)
        sources = [n for n in node.all_input_nodes if tensors_in(self.values[n])]
        first = len(sources) == 1 or (sources and operation(node, self.network) in LIKE)
        before = self._rows(sources[0]) if first and sources[0] is node.all_input_nodes[0] else None
        if before is None or operation(node, self.network) in LINEAR:
            return before
        if node not in self.moves:
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: before[1] if n is sources[0] else self.values[n])
        return before[0], tree_map_only(Tensor, compact, self.run(node, args, kwargs))

    def _outputs(self, layer: str) -> int:
        return next(
            len(labels) for (name, side), labels in self.members.items() if name == layer and side in ("out", "tied")
        )

    def _is_written(self, node: fx.Node) -> bool:
        """Whether a node is one of the user's own graph, in which a cut can write."""
        return node.meta.get("traced_as") in self.reading.written

    def _written(self, node: fx.Node, path: str, vector: Tensor) -> None:
        """At this place of the node's arguments stands how many channels these are."""
        if self._is_written(node) and bool(vector.any()):
            self.members[(f"{node.meta['traced_as']}:{path}", "size")] = vector
            if path != "scale":
                self.sizes.setdefault(node, []).append((path, vector))

    def _note_sizes(self, node: fx.Node, name: str, found: Any) -> None:
        """Where the code of a move writes how many channels there are."""
        parts = tensors_in(found)
        if name in ("reshape", "view", "expand", "repeat") and len(parts) == 1:
            start = "1." if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else ""
            known = dict(places(node.args))
            for dim in varying(parts[0]):
                path = f"{start}{dim}" if start else str(dim + 1)
                if path in known and known[path] != -1:
                    self._written(node, path, _along(parts[0], dim))
        if name == "split" and len(node.args) > 1:
            pieces = node.args[1]
            for i, part in enumerate(parts if isinstance(pieces, tuple | list) else parts[:1]):
                for dim in varying(part):
                    self._written(node, f"1.{i}" if isinstance(pieces, tuple | list) else "1", _along(part, dim))

    def _reduced(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        x, shape = args[0], shape_of(node)
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = list(range(x.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        if shape is None or {d % x.dim() for d in dims} & set(varying(x)):
            return self._unknown(node, [x])
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        for dim in sorted((d % x.dim() for d in dims), reverse=True):
            x = x.narrow(dim, 0, 1) if keep else x.select(dim, 0)
        return x

    def _spatial(self, node: fx.Node, x: Tensor) -> Any:
        """Pools and the like: each channel of a map for itself."""
        shape = shape_of(node)
        if shape is None or len(shape) != x.dim() or shape[:2] != x.shape[:2] or set(varying(x)) - {0, 1}:
            return self._unknown(node, [x])
        for dim in range(2, x.dim()):
            x = x.narrow(dim, 0, 1)
        return x.expand(shape)

    def _padded(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Zeros, or whatever else, around each channel; and channels of zeros before and after."""
        pad = args[1] if len(args) > 1 else kwargs["pad"]
        around = 2 * (args[0].dim() - 2)
        if len(pad) <= around:
            return self._spatial(node, args[0])
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        if any(pad[:around]) or mode != "constant":  # a reflection puts channels beside channels
            return self._unknown(node, [args[0]])
        return self._moved(node, args, kwargs)

    def _moved(self, node: fx.Node, args: Any, kwargs: Any, name: str = "") -> Any:
        self.moves.append(node)
        if name == "channelshuffle" and node.op == "call_module":
            parts = args[0].unflatten(1, (self.network.layers[str(node.target)].groups, -1))
            self.channels.unite(parts[:, :1].expand_as(parts), parts, "they are shuffled with channels that stay whole")
        found = self.run(node, args, kwargs)
        if (
            name in ("chunk", "split", "tensorsplit") and len({x.shape for x in found}) == 1
        ):  # equal pieces stay so where each loses as much
            for part in found[1:]:
                self.channels.unite(found[0], part, "they are taken apart from channels that stay whole")
        found = tree_map_only(Tensor, lambda x: self._tied(self.again(x)), found)
        self._note_sizes(node, name, found)
        return found

    def _tied(self, x: Tensor) -> Tensor:
        """Labels that change along one dimension alone, so that channels can be cut out: others are tied, as few as can be."""
        dims = varying(x)
        if len(dims) < 2:
            return x

        def tie(channels: Channels, dim: int) -> int:
            rows = thin(x).movedim(dim, 0).flatten(1)
            channels.unite(rows[:, :1].expand_as(rows), rows, "they lie beside channels that stay whole")
            return len(channels.root[rows].unique())

        def left(dim: int) -> int:
            return tie(self.channels.copy(), dim)

        order = (
            dims if 1 in dims else dims[::-1]
        )  # of equals that of a map's channels, or else the last: a head's width
        tie(self.channels, max(order, key=left))
        return self.again(x)

    def again(self, x: Tensor) -> Tensor:
        """Labels as they are now: channels that go together have one number."""
        return compact(self.channels.root[thin(x)].expand(x.shape))

    def _unknown(self, node: fx.Node, labels: list[Tensor], why: str | None = None) -> Any:
        return self._fenced(labels, why or f"{in_words(self.network, node)} mixes them", shape_of(node))

    def _fenced(self, labels: list[Tensor], why: str, shape: tuple[int, ...] | None = None) -> Any:
        for x in labels:
            self.channels.stay(x, why)
        return _SEVERAL if shape is None else nobody(shape)

    def run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A node that only moves data or computes sizes, on labels or on numbers."""
        if any(value is _SEVERAL for value in tree_leaves((args, kwargs))):
            shape = shape_of(node)
            return _SEVERAL if shape is None else nobody(shape)
        if node.op == "call_module":
            layer = self.network.layer(node)
            assert isinstance(layer, nn.Module)
            return layer(*args)
        if node.op == "call_method":
            name = "reshape" if node.target == "view" else str(node.target)  # labels are expanded: no view goes through
            return getattr(args[0], name)(*args[1:], **kwargs)
        if node.target is F.pad:
            return F.pad(args[0], args[1] if len(args) > 1 else kwargs["pad"])  # what is around belongs to no channel
        assert callable(node.target)
        return node.target(*(list(x) if isinstance(x, list) else x for x in args), **kwargs)


def _along(x: Tensor, dim: int) -> Tensor:
    """The labels along the one dimension on which they change."""
    return x[tuple(slice(None) if d == dim else 0 for d in range(x.dim()))]


class _Several:
    """The results of an operation that returns several; what reads them is known by its shape."""


_SEVERAL = _Several()
