"""The shape of every tensor in a normalised graph: by formula where plain, else by a run on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.activations import rule_of
from rmprune.graph.convolution import Conv, from_module, output_size
from rmprune.graph.network import Network


def propagate_shapes(network: Network, example_inputs: tuple[Tensor, ...]) -> None:
    """Runs the graph on the meta device and notes the shape of every tensor."""
    values: dict[fx.Node, Any] = {}
    given = iter(example_inputs)
    for node in network.graph.nodes:
        if node.op == "placeholder":
            values[node] = _input(next(given, None), node)
        elif node.op == "get_attr":
            values[node] = _meta(network.constants.get(str(node.target)))
        elif node.op == "output":
            continue
        else:
            values[node] = _run_meta(network, node, fx.map_arg((node.args, node.kwargs), lambda n: values[n]))
        if isinstance(values[node], Tensor):
            node.meta["shape"] = tuple(values[node].shape)
        else:
            node.meta.pop("shape", None)
    if next(given, None) is not None:
        raise UnsupportedModel(f"the network takes fewer inputs than the {len(example_inputs)} given")


def _input(value: Tensor | None, node: fx.Node) -> Tensor | Any:
    if value is not None:
        return torch.empty(
            value.shape, dtype=torch.float64 if value.is_floating_point() else value.dtype, device="meta"
        )
    if node.args:
        return node.args[0]
    raise UnsupportedModel(f"the network takes an input {node.target!r} that example_inputs lack")


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _run_meta(network: Network, node: fx.Node, arguments: Any) -> Any:
    args, kwargs = arguments
    try:
        if node.op == "call_module":
            module = network.layer(node)
            assert isinstance(module, nn.Module)
            known = _known_shape(module, args)
            if known is not None:
                return torch.empty(known, dtype=args[0].dtype, device="meta")
            return on_meta(module).double()(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
    except Exception as error:
        inputs = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
        raise UnsupportedModel(f"{node.target}: fails on inputs of shape {inputs}: {error}") from error


def on_meta(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have no values."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): _meta_like(tensor) for tensor in tensors})


def _known_shape(module: nn.Module, args: tuple[Any, ...]) -> tuple[int, ...] | None:
    """The output shape where it is plain, at a thousandth of the cost of a run on the meta device."""
    shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
    if len(shape) != 4 or len(args) > 1:
        return None
    if rule_of(module) is not None and not isinstance(module, nn.PReLU):
        return shape
    if type(module) is nn.BatchNorm2d and module.num_features == shape[1]:
        return shape
    if isinstance(module, nn.Conv2d) and module.in_channels == shape[1] and not module.weight.is_meta:
        conv = from_module(module, shape[1])
        size = output_size(conv.geometry, (shape[2], shape[3])) if isinstance(conv, Conv) else (0, 0)
        return (shape[0], module.out_channels, *size) if min(size) > 0 else None
    return None


def _meta_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
