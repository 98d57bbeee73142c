"""The layers of a network as measurable shapes: kind, widths, and how to build one alone. Times are
latency_model.py's business.
"""

import json
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.calls import is_addition
from rmprune.graph.fold import fold_batch_norms
from rmprune.graph.listed import shaped
from rmprune.graph.network import GONE, named
from rmprune.graph.vocabulary import LAYERS

_FREE = ("Flatten", *GONE)
_ACTIVATIONS = (
    "ReLU", "ReLU6", "Hardtanh", "Hardswish", "Hardsigmoid", "SiLU", "GELU", "Sigmoid", "LeakyReLU", "PReLU", "ELU", "Mish",
)  # fmt: skip
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


class TimedLayer(NamedTuple):
    """One step of a network as it is executed: a layer with the addition and activation that runtimes fuse into it.

    `kind` is JSON and holds everything but the widths: type, arguments, input size without channels, activation, and
    whether a residual is added. `cin` and `cout` are channels (features of a linear layer).
    """

    kind: str
    cin: int
    cout: int

    def build(self, batch_size: int) -> tuple[nn.Module, Tensor]:
        """The layer alone, in eval mode with random weights, and an input of `batch_size` images."""
        kind = json.loads(self.kind)
        args = dict(kind["args"])
        width = {"Conv2d": ("in_channels", "out_channels"), "Linear": ("in_features", "out_features")}.get(kind["type"])
        if width is not None:
            args |= {width[0]: self.cin, width[1]: self.cout}
        if args.get("groups") == "depthwise":
            args["groups"] = self.cin
        modules = [] if kind["type"] is None else [LAYERS[kind["type"]].make(args)]
        x = torch.randn(batch_size, self.cin, *kind["size"])
        if kind["add"]:
            with torch.no_grad():
                modules.append(_AddConstant(nn.Sequential(*modules)(x)))
        if kind["activation"]:
            modules.append(LAYERS[kind["activation"]["type"]].make(kind["activation"]["args"]))
        return nn.Sequential(*modules).eval(), x


class _AddConstant(nn.Module):
    """Adds a fixed tensor, as the residual of an isolated layer."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("residual", torch.randn(like.shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.get_buffer("residual"))


def network_layers(model: nn.Module, example_inputs: Tensor) -> list[TimedLayer]:
    """The layers of `model` for images of `example_inputs`' size, in order: batch norms folded, additions and
    activations fused.

    Left out, as they cost next to nothing: flattening, identities, dropout, functions other than additions and relu.
    Raises UnsupportedModel where torch.fx cannot trace the network.
    """
    return _read_graph(shaped(fold_batch_norms(model, (example_inputs,)), example_inputs[:1]))


def _read_graph(module: fx.GraphModule) -> list[TimedLayer]:
    modules = dict(module.named_modules())
    position = {node: number for number, node in enumerate(module.graph.nodes)}
    done: set[fx.Node] = set()
    layers: list[TimedLayer] = []
    for node in module.graph.nodes:
        own = modules[node.target] if node.op == "call_module" else None
        if node in done or (own is not None and named(own, _FREE)) or (own is None and not _is_addition(node)):
            continue
        shape, end, add = _shape(_sources(node)[0]), node, own is None
        after = _only_user(end)
        fuses = own is not None and after is not None and _is_addition(after)
        if fuses and after is not None and max(_sources(after), key=position.__getitem__) is node:
            add, end = True, after  # runtimes fuse a sum into the layer that comes last
        activation = _activation(_only_user(end), modules) if type(own).__name__ not in _ACTIVATIONS else None
        done |= {end, *([] if activation is None else end.users)}
        layers.append(_layer(own, shape, _shape(node)[1], activation, add))
    return layers


def _layer(own: nn.Module | None, shape: tuple[int, ...], cout: int, activation: Any, add: bool) -> TimedLayer:
    kind: dict[str, Any] = {"type": None, "args": {}, "size": list(shape[2:]), "activation": activation, "add": add}
    if own is not None:
        if type(own).__name__ not in LAYERS:
            raise UnsupportedModel(f"{type(own).__name__} layers cannot be timed one by one")
        args = LAYERS[type(own).__name__].read(own)
        args = {
            k: v for k, v in args.items() if k not in ("in_channels", "out_channels", "in_features", "out_features")
        }
        if isinstance(own, nn.Conv2d) and own.groups == own.in_channels == own.out_channels > 1:
            args["groups"] = "depthwise"
        kind |= {"type": type(own).__name__, "args": args}
    return TimedLayer(json.dumps(kind, sort_keys=True), shape[1], cout)


def _sources(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.args if isinstance(a, fx.Node)]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_addition(node: fx.Node) -> bool:
    return is_addition(node) and len(_sources(node)) == 2


def _activation(node: fx.Node | None, modules: dict[str, nn.Module]) -> dict[str, Any] | None:
    """Type and arguments of the activation that `node` applies; in place or not is the same to a runtime."""
    if node is None:
        return None
    if node.op == "call_module" and type(modules[str(node.target)]).__name__ in _ACTIVATIONS:
        own = modules[str(node.target)]
        args = LAYERS[type(own).__name__].read(own)
        return {"type": type(own).__name__, "args": args | ({"inplace": False} if "inplace" in args else {})}
    relu = node.op in ("call_function", "call_method") and node.target in _RELUS
    return {"type": "ReLU", "args": {"inplace": False}} if relu else None


def neighbours(width: int, block: int) -> tuple[int, int]:
    """The widths to measure around `width`, which lies between them or is both.

    Kernels work on blocks of channels and pad the last one, so time climbs in stairs; and they take other paths for
    widths that 8, 4 or 2 does not divide. So both neighbours lie in the block of `width` and have its divisor of 8:
    in blocks of 16, 23 lies between 17 and 31, 22 between 18 and 30, 20 between 20 and 28; 24 and 32 are measured.
    """
    offset = math.gcd(width, 8) % 8
    start = (width - 1) // block * block
    if offset == 0 or width < 8:
        return width, width
    return start + offset, start + block - offset
