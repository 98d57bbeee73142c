"""The graph that removal works on: a torch.fx graph, its layers (modules, or convolutions as data) and shapes. No passes here."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmprune.removal.kernels import Conv

Layer = nn.Module | Conv

GONE = (
    "Identity",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "AlphaDropout",
    "FeatureAlphaDropout",
    "StochasticDepth",
    "DropPath",
)
_OPAQUE = ("Conv2dSame", "AvgPool2dSame", "MaxPool2dSame", "BlurPool2d")
WHOLE = ("BatchNormAct2d", "FrozenBatchNorm2d", *_OPAQUE, *GONE)


def named(module: nn.Module, names: tuple[str, ...]) -> bool:
    """A class of torch, torchvision or timm with one of these names; a user's class of the same name may do anything."""
    return type(module).__name__ in names and type(module).__module__.split(".")[0] in ("torch", "torchvision", "timm")


@dataclass
class Network:
    """A normalised network: every call_module node has its own target in `layers`; shapes are in node.meta["shape"]."""

    graph: fx.Graph
    layers: dict[str, Layer] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def layer(self, node: fx.Node) -> Layer | None:
        return self.layers.get(str(node.target)) if node.op == "call_module" else None

    def add(self, name: str, layer: Layer) -> str:
        """Registers a layer under a free name like `name` and returns that name."""
        unique, count = name, 0
        while unique in self.layers:
            count += 1
            unique = f"{name}_{count}"
        self.layers[unique] = layer
        return unique


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    return node.meta.get("shape")


def example_tuple(example_inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)


def is_batch_norm(layer: Layer | None) -> bool:
    return isinstance(layer, _BatchNorm)
