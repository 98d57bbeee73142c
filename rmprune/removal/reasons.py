"""Why an addition is no residual that can go, in the words of the user's code. Finds nothing and changes nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from rmprune.removal.kernels import Conv
from rmprune.removal.network import Network

_GATES = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_CONCATENATIONS = (torch.cat, torch.concat)


def describe(network: Network, node: fx.Node) -> str:
    """A node as code: "a MaxPool2d", "a slice, x[:, 8:]", "a call of x.permute(...)"."""
    layer = network.layer(node)
    if isinstance(layer, Conv):
        return "a convolution"
    if isinstance(layer, nn.Module):
        name = type(layer).__name__
        return f"an {name}" if name[0] in "AEIO" else f"a {name}"
    if node.op == "placeholder":
        return "an input of the network"
    if node.op == "get_attr":
        return f"the tensor {node.target}"
    if node.target is operator.getitem:
        index = node.args[1]
        return (
            f"a slice, x[{_code(index)}]" if isinstance(index, tuple | slice) else f"one of several results, x[{index}]"
        )
    if node.op == "call_method":
        return f"a call of x.{node.target}(...)"
    return f"a call of {getattr(node.target, '__name__', node.target)}(...)"


def _code(index: Any) -> str:
    if isinstance(index, tuple):
        return ", ".join(_code(part) for part in index)
    if not isinstance(index, slice):
        return str(index)
    start, stop = ("" if end is None else str(end) for end in (index.start, index.stop))
    return f"{start}:{stop}" + ("" if index.step is None else f":{index.step}")


def why_no_fork(network: Network, end: fx.Node, passable: bool, not_linear: str) -> str:
    """Names what ends the walk back from an addition before branch and shortcut meet.

    passable: it is a layer that could be walked through; not_linear: why it is no kernel, if it is a module.
    """
    if end.target in _GATES:
        return (
            "its branch is multiplied by a value that is computed on the way (a gate, squeeze-and-excitation): the gate would "
            "multiply the reserved copies too, which need a factor of exactly 1"
        )
    if end.target in _ADDS:
        return "its branch holds another residual that stays"
    if end.target in _CONCATENATIONS:
        return "its branch concatenates several ways: it is no chain of layers"
    if passable and len(end.users) > 1:
        return f"the output of {describe(network, end)} inside its branch is read elsewhere, too: the branch is no chain of layers"
    if end.op == "placeholder":
        return "its two ways start from different values: it adds maps of two sources"
    if not_linear:
        return f"its branch or shortcut holds a layer that no kernel stands for: {not_linear}"
    return (
        f"its branch or shortcut holds {describe(network, end)}, which is no layer of a kind that can be followed: no chain of "
        "layers leads back to the fork"
    )
