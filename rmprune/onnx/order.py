"""The nodes of an ONNX graph in an order that they can be run in, without those that nothing needs; names as they can be printed."""

from __future__ import annotations

import contextlib
import graphlib

import onnx

from rmprune.errors import ArtifactError, in_one_line


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Puts nodes that stand before what they read behind it: converters to float16 append their casts. Circles stay, and are refused."""
    places = {name: i for i, node in enumerate(graph.node) for name in filter(None, node.output)}
    before = {i: {places[name] for name in node.input if name in places} for i, node in enumerate(graph.node)}
    if any(place >= i for i, given in before.items() for place in given):
        with contextlib.suppress(graphlib.CycleError):
            order = list(graphlib.TopologicalSorter(before).static_order())
            nodes = [onnx.NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
            graph.ClearField("node")
            graph.node.extend(nodes)


def drop_unread(graph: onnx.GraphProto, weights: set[str]) -> None:
    """Leaves out what no output needs, which need not be of kinds that are read. Out of order, `check_names` says what is missing."""
    needed = {value.name for value in graph.output}
    for i, node in reversed(list(enumerate(graph.node))):
        if needed.isdisjoint(filter(None, node.output)):
            del graph.node[i]
        else:
            needed.update(node.input)
    unread = weights - needed
    for entries in (graph.initializer, graph.input):  # older exporters list weights among the inputs
        for i, entry in reversed(list(enumerate(entries))):
            if entry.name in unread:
                del entries[i]


def check_names(graph: onnx.GraphProto) -> None:
    """Raise unless every name is given once, and before it is read."""
    weights = [tensor.name for tensor in graph.initializer]
    known = {*weights, *(value.name for value in graph.input), ""}
    if len(set(weights)) < len(weights):
        raise ArtifactError("two of its tensors have one name; export the network again")
    for node in graph.node:
        for name in node.input:
            if name not in known:
                raise ArtifactError(
                    f"{said_of(node)} reads {printable(name)}, which nothing before it gives; export the network again"
                )
        for name in filter(None, node.output):
            if name in known:
                raise ArtifactError(
                    f"{said_of(node)} gives {printable(name)}, which is there already; export the network again"
                )
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise ArtifactError(f"nothing gives its output {printable(value.name)}; export the network again")


def said_of(node: onnx.NodeProto) -> str:
    """A node in words: its operator, and its name or the first thing that it gives."""
    name = node.name or next(iter(node.output), "")
    return f"{printable(node.op_type)} {printable(name)}"


def printable(text: str) -> str:
    """A name from outside as it can be printed, of bounded length."""
    return in_one_line(text[:100]) or "(no name)"
