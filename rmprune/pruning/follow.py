"""Which channel each element of each value belongs to, followed through a normalised graph. `find_groups` makes groups of it.

A layer numbers its output channels anew; operations that only move data are run on the numbers themselves; sums of two maps tie
the channels that meet; whatever is unknown, or needs channels in their number or order, leaves those it touches whole, and says why.
"""

from collections.abc import Mapping
from typing import Any

from torch import Size, Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from rmprune.graph.network import in_words, shape_of
from rmprune.graph.tensors import all_tensors, tensors_in
from rmprune.pruning.labelled import Labelled, along
from rmprune.pruning.labels import Channels, compact, nobody, thin, varying
from rmprune.pruning.layers import Weighted, channels_read, in_and_out, is_depthwise, rank_read
from rmprune.pruning.operations import (
    ALONG,
    ELEMENTWISE,
    INDEXING,
    MOVES,
    REDUCTIONS,
    SPATIAL,
    batched,
    operation,
    product,
)
from rmprune.pruning.products import multiplied
from rmprune.pruning.reading import Reading
from rmprune.pruning.written_sizes import places


class Walk(Labelled):
    """The labels of every value of a network, and who has which, once they are followed from its inputs to its outputs."""

    def __init__(self, reading: Reading, whole: Mapping[str, str]) -> None:
        super().__init__(reading, whole)
        for node in self.network.graph.nodes:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda n: tree_map_only(Tensor, self.again, self.values[n])
            )
            labels = tensors_in((args, kwargs))
            found = self._value(node, args, kwargs, labels)
            if isinstance(found, Tensor) and tuple(found.shape) != shape_of(node):
                found = self.unknown(node, labels)
            self.values[node] = found

    def _value(self, node: fx.Node, args: Any, kwargs: Any, labels: list[Tensor]) -> Any:
        if node.op == "output":
            many = len(labels) > 1
            why = "its channels are among the network's outputs" if many else "its channels are the network's output"
            return self.fenced(labels, why)
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
        if (
            name in ELEMENTWISE and shape_of(node) is not None and (name != "prelu" or len(labels) == 1)
        ):  # a slope a channel
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
        return self.unknown(node, labels) if letters is None else multiplied(self, node, name, labels, *letters)

    # Layers

    def _layer(self, node: fx.Node, layer: nn.Module, labels: list[Tensor]) -> Any:
        """What a layer with tensors of its own makes of its input; None for one that has none but a number."""
        name, size = self.reading.owner(layer) or self.reading.owners.get(id(layer)), channels_read(layer)
        if size is None and not any(t.numel() > 1 for t in all_tensors(layer)):
            return None
        if name is None:
            return self.unknown(node, labels, "a free-standing parameter has these channels")
        if isinstance(layer, Weighted):
            self._note(node, name, labels)
        if name in self.apart:
            self.whole.setdefault(name, "code reads its tensors beside it")
        if name in self.whole:
            return self.unknown(node, labels, f"{name}: {self.whole[name]}")
        if isinstance(layer, nn.LayerNorm) and len(labels) == 1:
            x = labels[0]
            if max(varying(x), default=0) < x.dim() - len(layer.normalized_shape):  # each channel for itself
                return x
        if size is None or len(labels) != 1:
            kind = type(layer).__name__
            if any(t.dim() > 1 for t in layer.parameters()):
                self.whole[name] = f"layers of type {kind} are not pruned"
            does = "normalises over channels" if "Norm" in kind else "has these channels and cannot be sliced"
            return self.unknown(node, labels, f"{name} ({kind}) {does}")
        x = labels[0]
        dim, rank = x.dim() - 1 if isinstance(layer, nn.Linear) else 1, rank_read(layer)
        if x.dim() != (rank or max(x.dim(), 2)) or x.shape[dim] != size or set(varying(x)) - {dim}:
            self.channels.stay(x, f"{name} reads its channels as positions")
            x = nobody(x.shape)
        vector = along(x, dim)
        if isinstance(layer, Weighted):
            return self._weighted(node, name, layer, vector)
        if isinstance(layer, nn.GroupNorm):
            self._same_place(vector.view(layer.num_groups, -1).T, f"{name} normalises over channels that stay")
        self.member(name, "tied", vector)
        return self.again(x)

    def _weighted(self, node: fx.Node, name: str, layer: Weighted, vector: Tensor) -> Tensor:
        after = shape_of(node)
        assert after is not None
        if is_depthwise(layer):
            self.fans[name] = layer.out_channels // len(vector)  # type: ignore[operator, assignment]
            vector = vector.repeat_interleave(self.fans[name])
            self.member(name, "tied", vector)
            out = self.channels.root[vector]
        else:
            self.member(name, "in", vector)
            out = self.channels.new(in_and_out(layer)[1])
            self.member(name, "out", out)
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

    def _note_sizes(self, node: fx.Node, name: str, found: Any) -> None:
        """Where the code of a move writes how many channels there are."""
        parts = tensors_in(found)
        if name in ("reshape", "view", "expand") and len(parts) == 1:
            start = "1." if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else ""
            known = dict(places(node.args))
            for dim in varying(parts[0]):
                path = f"{start}{dim}" if start else str(dim + 1)
                if path in known and known[path] != -1:
                    self.written(node, path, along(parts[0], dim))
        if name == "split" and len(node.args) > 1:
            pieces = node.args[1]
            for i, part in enumerate(parts if isinstance(pieces, tuple | list) else parts[:1]):
                for dim in varying(part):
                    self.written(node, f"1.{i}" if isinstance(pieces, tuple | list) else "1", along(part, dim))

    def _reduced(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        x, shape = args[0], shape_of(node)
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = list(range(x.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        if shape is None or {d % x.dim() for d in dims} & set(varying(x)):
            return self.unknown(node, [x])
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        for dim in sorted((d % x.dim() for d in dims), reverse=True):
            x = x.narrow(dim, 0, 1) if keep else x.select(dim, 0)
        return x

    def _spatial(self, node: fx.Node, x: Tensor) -> Any:
        """Pools and the like: each channel of a map for itself."""
        shape = shape_of(node)
        if shape is None or len(shape) != x.dim() or shape[:2] != x.shape[:2] or set(varying(x)) - {0, 1}:
            return self.unknown(node, [x])
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
            return self.unknown(node, [args[0]])
        return self._moved(node, args, kwargs)

    def _moved(self, node: fx.Node, args: Any, kwargs: Any, name: str = "") -> Any:
        self.moves.append(node)
        if name == "channelshuffle" and node.op == "call_module":
            parts = args[0].unflatten(1, (self.network.layers[str(node.target)].groups, -1))
            self.channels.unite(parts[:, :1].expand_as(parts), parts, "they are shuffled with channels that stay whole")
        found = self.run(node, args, kwargs)
        # Equal pieces stay so where each loses as much.
        if name in ("chunk", "split", "tensorsplit") and len({x.shape for x in found}) == 1:
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

        # Of equals, that of a map's channels, or else the last: a head's width.
        order = dims if 1 in dims else dims[::-1]
        tie(self.channels, max(order, key=left))
        return self.again(x)
