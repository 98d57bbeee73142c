"""Which channel each element of each value belongs to, followed through a normalised graph. `find_groups` makes groups of it.

A layer numbers its output channels anew; operations that only move data are run on the numbers themselves; sums of two maps tie
the channels that meet; whatever is unknown, or needs channels in their number or order, leaves those it touches whole, and says why.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from rmprune.errors import UnsupportedModel
from rmprune.graph.activations import rule_of
from rmprune.graph.convolution import Scale, plain
from rmprune.graph.network import describe, shape_of
from rmprune.pruning.groups import is_depthwise
from rmprune.pruning.reading import Reading

NORMS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LocalResponseNorm,
)
ELEMENTWISE_MODULES = (
    nn.Threshold,
    nn.SELU,
    nn.CELU,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Tanhshrink,
)
SPATIAL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool2d, nn.Upsample,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
MOVE_MODULES = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle)
ELEMENTWISE = frozenset(
    """add sub rsub mul div truediv true_divide floordiv iadd isub imul itruediv multiply subtract divide maximum minimum pow
    neg abs exp expm1 log log1p sqrt rsqrt square sign erf sin cos reciprocal clamp clip clamp_min clamp_max
    relu relu6 hardtanh hardswish hardsigmoid leaky_relu silu gelu elu selu celu mish sigmoid tanh softplus softsign logsigmoid
    threshold dropout dropout1d dropout2d contiguous clone detach to float double half type_as zeros_like ones_like
    stochastic_depth eq ne lt le gt ge""".split()
)  # fmt: skip
REDUCTIONS = frozenset("mean sum amax amin std var".split())
SPATIAL = frozenset(
    """max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d interpolate""".split()
)
MOVES = frozenset(
    """view reshape flatten unflatten permute transpose t T swapaxes swapdims movedim moveaxis chunk split tensor_split narrow select
    getitem cat concat concatenate stack flip roll expand expand_as view_as repeat repeat_interleave index_select squeeze unsqueeze
    unbind pixel_shuffle pixel_unshuffle channel_shuffle getattr size dim ndimension numel nelement""".split()
)  # fmt: skip


class Channels:
    """A union-find over channels, numbered from 1. Channels that go together have the same root; those that stay have root 0."""

    def __init__(self) -> None:
        self.root = torch.zeros(1, dtype=torch.int64)
        self._why = torch.zeros(1, dtype=torch.int64)
        self._texts = [""]

    def new(self, count: int) -> Tensor:
        """Numbers [count] for the outputs of a layer."""
        numbers = torch.arange(len(self.root), len(self.root) + count)
        self.root = torch.cat([self.root, numbers])
        self._why = torch.cat([self._why, torch.zeros_like(numbers)])
        return numbers

    def stay(self, labels: Tensor, why: str) -> bool:
        """Leave these channels whole; False where all of them were already."""
        roots = self.root[thin(labels)].unique()
        found = torch.isin(self.root, roots[roots > 0])
        self._texts.append(why)
        self._why[found] = len(self._texts) - 1
        self.root[found] = 0
        return bool(found.any())

    def unite(self, first: Tensor, second: Tensor, why: str) -> None:
        """The channels at the same place of two tensors of one shape go together; `why`, where one of them must stay."""
        pairs = torch.stack([self.root[first].flatten(), self.root[second].flatten()])
        parent: dict[int, int] = {}

        def find(number: int) -> int:
            while number in parent:
                number = parent[number]
            return number

        for pair in pairs[:, pairs[0] != pairs[1]].unique(dim=1).T.tolist():
            low, high = sorted(map(find, pair))
            if low != high:
                parent[high] = low
        if not parent:
            return
        moved = torch.tensor(list(parent))
        ends = torch.tensor([find(number) for number in parent])
        if bool((ends == 0).any()):
            self.stay(moved[ends == 0], why)
        to = torch.arange(len(self.root)).index_copy(0, moved, ends)
        self.root = to[self.root]

    def why(self, labels: Tensor) -> str | None:
        """The reason for which the first of these channels that must stay does; None where all may go."""
        whole = labels[(labels > 0) & (self.root[labels] == 0)]
        return self._texts[int(self._why[whole[0]])] if len(whole) else None


def thin(x: Tensor) -> Tensor:
    """x without the repetitions of expanded dimensions."""
    for dim in range(x.dim()):
        if x.shape[dim] > 1 and x.stride(dim) == 0:
            x = x.narrow(dim, 0, 1)
    return x


def compact(x: Tensor) -> Tensor:
    """The same values, expanded along each dimension on which they do not change."""
    small = thin(x)
    for dim in range(x.dim()):
        if small.shape[dim] > 1 and bool((small == small.narrow(dim, 0, 1)).all()):
            small = small.narrow(dim, 0, 1)
    return small.expand(x.shape)


def varying(x: Tensor) -> list[int]:
    """The dimensions along which a compact tensor changes."""
    return [dim for dim in range(x.dim()) if x.shape[dim] > 1 and x.stride(dim) != 0]


class Walk:
    """The labels of every value, and who has which: `members` {(layer, "out" | "in" | "tied"): labels of its channels}.

    `whole`: {module: why it cannot be sliced}.
    """

    def __init__(self, reading: Reading, whole: Mapping[str, str]) -> None:
        self.reading, self.network, self.whole = reading, reading.network, whole
        self.channels = Channels()
        self.members: dict[tuple[str, str], Tensor] = {}
        self.layers: dict[
            fx.Node, str
        ] = {}  # convolutions and linear layers, and the shapes of what they read and put out
        self.shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
        self.values: dict[fx.Node, Any] = {}
        self.moves: list[fx.Node] = []  # and what only computes sizes
        for node in self.network.graph.nodes:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda n: tree_map_only(Tensor, self._again, self.values[n])
            )
            self.values[node] = self._value(node, args, kwargs, _tensors((args, kwargs)))

    def _value(self, node: fx.Node, args: Any, kwargs: Any, labels: list[Tensor]) -> Any:
        if node.op == "output":
            many = len(labels) > 1
            why = "its channels are among the network's outputs" if many else "its channels are the network's output"
            return self._fenced(labels, why)
        if node.op in ("placeholder", "get_attr"):
            shape = shape_of(node)
            return self.network.constants.get(str(node.target)) if shape is None else _nobody(shape)
        if not labels and node.op != "call_module":
            self.moves.append(node)
            return tree_map_only(Tensor, lambda x: _nobody(x.shape), self._run(node, args, kwargs))
        layer = self.network.layer(node)
        if len(labels) == 1 and isinstance(layer, nn.Module):
            return self._layer(node, layer, labels[0])
        name = operation(node)
        if name in ELEMENTWISE and shape_of(node) is not None:
            return self._joined(node, labels)
        if name in REDUCTIONS and len(labels) == 1:
            return self._reduced(node, args, kwargs)
        if name in SPATIAL and len(labels) == 1:
            return self._spatial(node, labels[0])
        if name == "pad" and len(labels) == 1:
            return self._padded(node, args, kwargs)
        if name in MOVES:
            return self._moved(node, args, kwargs)
        return self._unknown(node, labels)

    # Layers

    def _layer(self, node: fx.Node, layer: nn.Module, x: Tensor) -> Any:
        name = self.reading.owner(layer)
        size = _in_channels(layer)
        if name is not None and isinstance(layer, nn.Conv2d | nn.Linear):
            self._note(node, name, x.shape)
        if size is not None and name is not None and name not in self.whole:
            dim = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
            batched = x.dim() == 4 or (x.dim() > 1 and not isinstance(layer, nn.Conv2d))
            if not batched or x.shape[dim] != size or set(varying(x)) - {dim}:
                self._unknown(node, [x], f"{name} reads its channels as positions")
                x = _nobody(x.shape)
            vector = x[tuple(slice(None) if d == dim else 0 for d in range(x.dim()))]
            if isinstance(layer, nn.Conv2d | nn.Linear):
                return self._weighted(node, name, layer, vector)
            self._member(name, "tied", vector)
            return self._again(x)
        if rule_of(layer) is not None or isinstance(layer, ELEMENTWISE_MODULES):
            if not isinstance(layer, nn.PReLU) or layer.num_parameters == 1:
                return x
        if isinstance(layer, Scale) and len(layer.factor) == 1:
            return x
        if isinstance(layer, SPATIAL_MODULES):
            return self._spatial(node, x)
        if isinstance(layer, MOVE_MODULES):
            if isinstance(layer, nn.ChannelShuffle):
                parts = x.unflatten(1, (layer.groups, -1))
                self.channels.unite(parts[:, :1].expand_as(parts), parts, "")
                x = self._again(x)
            return self._moved(node, (x,), {})
        if isinstance(layer, NORMS):
            return self._unknown(node, [x], f"{node.target} ({type(layer).__name__}) normalises over channels")
        if name in self.whole:
            return self._unknown(node, [x], f"{name}: {self.whole[name]}")
        if name is None and (list(layer.parameters()) or list(layer.buffers())):
            return self._unknown(node, [x], "a free-standing parameter has these channels")
        return self._unknown(
            node, [x], f"{node.target} ({type(layer).__name__}) has these channels and cannot be sliced"
        )

    def _weighted(self, node: fx.Node, name: str, layer: nn.Conv2d | nn.Linear, vector: Tensor) -> Tensor:
        after = shape_of(node)
        assert after is not None
        if is_depthwise(layer):
            self._member(name, "tied", vector)
            out = self.channels.root[vector]
        else:
            self._member(name, "in", vector)
            out = self.channels.new(len(layer.weight))
            self._member(name, "out", out)
            groups = getattr(layer, "groups", 1)
            for side in (vector, out) if groups > 1 else ():  # the same position of every convolution group
                parts = side.reshape(groups, -1)
                why = f"{name}, a grouped convolution, reads channels that stay beside them"
                self.channels.unite(parts[:1].expand_as(parts), parts, why)
            out = self.channels.root[out]
        ends = (1,) * (len(after) - 2)
        return compact((out if isinstance(layer, nn.Linear) else out.view(-1, *ends)).expand(after))

    def _note(self, node: fx.Node, name: str, before: torch.Size) -> None:
        if name in self.shapes:
            raise UnsupportedModel(
                f"{name} is used twice in one forward pass; give each use its own layer before pruning"
            )
        self.layers[node], self.shapes[name] = name, (before, torch.Size(shape_of(node) or ()))

    def _member(self, name: str, side: str, vector: Tensor) -> None:
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
                self.channels.stay(x, f"{describe(self.network, node)} spreads them over other channels")
            else:
                kept.append(x.expand(shape))
        found = compact(kept[0]) if kept else _nobody(shape)
        for x in kept[1:]:
            first, second = found, x
            for dim in range(len(shape)):
                if shape[dim] > 1 and first.stride(dim) == second.stride(dim) == 0:
                    first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
            self.channels.unite(first, second, why)
        return self._again(found)

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
        return x[(..., *[slice(1)] * (x.dim() - 2))].expand(shape)

    def _padded(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Zeros, or whatever else, around each channel; and channels of zeros before and after."""
        pad = args[1] if len(args) > 1 else kwargs["pad"]
        around = 2 * (args[0].dim() - 2)
        if len(pad) <= around:
            return self._spatial(node, args[0])
        if any(pad[:around]):
            return self._unknown(node, [args[0]])
        return self._moved(node, args, kwargs)

    def _moved(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        self.moves.append(node)
        found = self._run(node, args, kwargs)
        if (
            operation(node) == "chunk" and found[0].shape == found[-1].shape
        ):  # it stays in the middle where both halves lose as much
            for part in found[1:]:
                self.channels.unite(found[0], part, "")
        return tree_map_only(Tensor, lambda x: self._tied(self._again(x)), found)

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
            trial = Channels()
            trial.root, trial._why = self.channels.root.clone(), self.channels._why.clone()
            return tie(trial, dim)

        tie(self.channels, max(dims, key=left))
        return self._again(x)

    def _again(self, x: Tensor) -> Tensor:
        return compact(self.channels.root[thin(x)].expand(x.shape))

    def _unknown(self, node: fx.Node, labels: list[Tensor], why: str | None = None) -> Any:
        return self._fenced(labels, why or f"{describe(self.network, node)} mixes them", shape_of(node))

    def _fenced(self, labels: list[Tensor], why: str, shape: tuple[int, ...] | None = None) -> Any:
        for x in labels:
            self.channels.stay(x, why)
        return _SEVERAL if shape is None else _nobody(shape)

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A node that only moves data or computes sizes, on labels or on numbers."""
        if any(value is _SEVERAL for value in tree_leaves((args, kwargs))):
            shape = shape_of(node)
            return _SEVERAL if shape is None else _nobody(shape)
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
        return node.target(*args, **kwargs)

    # Whether what moves channels still does with some of them gone

    def misfit(self, gone: Tensor) -> fx.Node | None:
        """The first operation that, run without the channels `gone` (bool, by root), does not give its result without them."""
        small: dict[fx.Node, Any] = {}
        moves = set(self.moves)
        for node in self.network.graph.nodes:
            if node.op == "output":
                break
            try:
                wanted = tree_map_only(Tensor, lambda x: self._without(x, gone), self.values[node])
                if node in moves:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: small[n])
                    found = self._run(node, args, kwargs)
                    if not _same(found, wanted):
                        return node
                    wanted = wanted if _tensors(wanted) else found  # sizes are those of the smaller network
                small[node] = wanted
            except (RuntimeError, ValueError, IndexError, TypeError):
                return node
        return None

    def leave(self, node: fx.Node) -> None:
        """Leave whole what a misfit touches: its result, or else what it reads, or else everything."""
        why = f"{describe(self.network, node)} is written for this number of channels"
        read = [self.values[n] for n in node.all_input_nodes]
        for values in (self.values[node], read, torch.arange(len(self.channels.root))):
            if any([self.channels.stay(x, why) for x in _tensors(values)]):
                return

    def _without(self, x: Tensor, gone: Tensor) -> Tensor:
        x = self._again(x)
        mask = compact(gone[thin(x)].expand(x.shape))
        dims = varying(mask)
        if not dims and not bool(mask.any()):
            return x
        if len(dims) != 1:
            raise ValueError("the channels that go are no slices of one dimension")
        stays = ~mask[tuple(slice(None) if d == dims[0] else 0 for d in range(x.dim()))]
        return x.index_select(dims[0], stays.nonzero().flatten()) if x.numel() < 4096 else _select(x, dims[0], stays)


class _Several:
    """The results of an operation that returns several; what reads them is known by its shape."""


_SEVERAL = _Several()


def _nobody(shape: Any) -> Tensor:
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def _select(x: Tensor, dim: int, stays: Tensor) -> Tensor:
    """x.index_select on a compact tensor, which stays one."""
    shape = [int(stays.sum()) if d == dim else size for d, size in enumerate(x.shape)]
    return thin(x).index_select(dim, stays.nonzero().flatten()).expand(shape)


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _same(found: Any, wanted: Any) -> bool:
    first, second = _tensors(found), _tensors(wanted)
    return len(first) == len(second) and all(
        a.shape == b.shape and bool((thin(compact(a)) == thin(compact(b))).all())
        for a, b in zip(first, second, strict=True)
    )


def _in_channels(layer: nn.Module) -> int | None:
    """How many channels a layer that can be sliced reads; None for any other."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels if plain(layer, nn.Conv2d) else None
    if isinstance(layer, nn.Linear):
        return layer.in_features if type(layer).forward is nn.Linear.forward else None
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return layer.num_features
    return layer.num_parameters if isinstance(layer, nn.PReLU) and layer.num_parameters > 1 else None


def operation(node: fx.Node) -> str:
    """What an operation of torch is called, `add` for +, add_ and torch.add; "" for others."""
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "__name__", "")
    known = node.target is getattr or any(getattr(m, name, None) is node.target for m in (torch, F, operator))
    return name.rstrip("_") if known or name == "stochastic_depth" else ""
