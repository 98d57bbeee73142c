"""What is known of a network while its channels are followed: the labels of its values, and who has which. Walks through nothing."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Size, Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from rmprune.graph.network import in_words, shape_of
from rmprune.pruning.groups import MemberSide
from rmprune.pruning.labels import Channels, compact, nobody, thin
from rmprune.pruning.reading import Reading


class Labelled:
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
        # Where code writes how many there are: of which channels.
        self.sizes: dict[fx.Node, list[tuple[str, Tensor]]] = {}

    def member(self, name: str, side: MemberSide, vector: Tensor) -> None:
        known = self.members.setdefault((name, side), vector)
        if known is not vector:
            self.channels.unite(known, vector, f"{name}, which is used twice, has channels that stay beside them")

    def outputs(self, layer: str) -> int:
        return next(
            len(labels) for (name, side), labels in self.members.items() if name == layer and side in ("out", "tied")
        )

    def is_written(self, node: fx.Node) -> bool:
        """Whether a node is one of the user's own graph, in which a cut can write."""
        return node.meta.get("traced_as") in self.reading.written

    def written(self, node: fx.Node, path: str, vector: Tensor) -> None:
        """At this place of the node's arguments stands how many channels these are."""
        if self.is_written(node) and bool(vector.any()):
            self.members[(f"{node.meta['traced_as']}:{path}", "size")] = vector
            if path != "scale":
                self.sizes.setdefault(node, []).append((path, vector))

    def again(self, x: Tensor) -> Tensor:
        """Labels as they are now: channels that go together have one number."""
        return compact(self.channels.root[thin(x)].expand(x.shape))

    def unknown(self, node: fx.Node, labels: list[Tensor], why: str | None = None) -> Any:
        return self.fenced(labels, why or f"{in_words(self.network, node)} mixes them", shape_of(node))

    def fenced(self, labels: list[Tensor], why: str, shape: tuple[int, ...] | None = None) -> Any:
        for x in labels:
            self.channels.stay(x, why)
        return SEVERAL if shape is None else nobody(shape)

    def run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A node that only moves data or computes sizes, on labels or on numbers."""
        if any(value is SEVERAL for value in tree_leaves((args, kwargs))):
            shape = shape_of(node)
            return SEVERAL if shape is None else nobody(shape)
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


def along(x: Tensor, dim: int) -> Tensor:
    """The labels along the one dimension on which they change."""
    return x[tuple(slice(None) if d == dim else 0 for d in range(x.dim()))]


class _Several:
    """The results of an operation that returns several; what reads them is known by its shape."""


SEVERAL = _Several()
