"""Layers whose widths a cut sets: convolutions, transposed ones and linear layers of any rank. Their sizes, their MACs, and where in
their tensors the channels lie. Knows no groups."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, SupportsFloat, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from rmprune.errors import ConfigError
from rmprune.graph.convolution import plain
from rmprune.graph.inputs import Inputs
from rmprune.graph.network import is_batch_norm, named
from rmprune.graph.tensors import own_tensors
from rmprune.measure.cost import count_macs

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Weighted = Convolution | nn.Linear
"""Layers with a weight that channels go into and come out of."""
Slices = tuple[tuple[int, Tensor], ...]
"""((dimension, int64 indices that stay), ...)."""
Shapes = Mapping[str, tuple[torch.Size, torch.Size]]
"""{layer: (input shape, output shape)} for one example."""


@dataclass(frozen=True)
class SizedLayer:
    """A convolution or linear layer: its shape, and which groups set its width. `inputs` / `outputs`: (group,
    channels a unit). `maps`: how many it reads for one example (frames of a video).

    kind "depthwise": one or several filters for each input channel; "rest": what all operations that are no such layer cost, whose
    widths nothing sets (products of maps, functional calls): `maps` is its MACs.
    """

    name: str
    kind: Literal["conv", "depthwise", "linear", "rest"]
    cin: int
    cout: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    bias: bool
    inputs: tuple[tuple[str, int], ...] = ()
    outputs: tuple[tuple[str, int], ...] = ()
    maps: int = 1
    transposed: bool = False


Cost = Callable[[SizedLayer, int, int], float]
"""cost(layer, cin, cout): what the layer costs at these widths (MACs, milliseconds, ...)."""


def price(cost: Cost, layer: SizedLayer, cin: int, cout: int) -> float:
    """`cost` of a layer. Raises ConfigError where that is no finite number."""
    found = cost(layer, cin, cout)
    if not isinstance(found, int | float):
        found = float(found) if isinstance(found, SupportsFloat) else math.nan
    if not math.isfinite(found):
        raise ConfigError(
            f"cost of layer {layer.name} from {cin} to {cout} channels is {found}; it must be a finite number"
        )
    return found


def macs(layer: SizedLayer, cin: int, cout: int) -> float:
    """Multiply-accumulates of one example: every tap of the kernel, c_in c_out / groups at every output position (of a depthwise
    layer c_out; of a transposed one at every input position).
    """
    if layer.kind == "rest":
        return float(layer.maps)
    positions = math.prod(layer.input_size if layer.transposed else layer.output_size)
    taps = math.prod(layer.kernel) * positions * layer.maps
    return float(taps * cout) if layer.kind == "depthwise" else taps * cin * cout / layer.groups


def channels(layer: SizedLayer, cin: int, cout: int) -> float:
    """Prunable output channels, the unit of `Budget.ratio` (a depthwise layer's are its producer's, and not counted twice)."""
    return float(cout) if layer.outputs and layer.kind != "depthwise" else 0.0


def sized_layers(model: nn.Module, example_inputs: Inputs, shapes: Shapes) -> tuple[SizedLayer, ...]:
    """The layers that `shapes` has, in the order of the modules, and last, where there is one, the rest: together they are `count_macs`."""
    found = [
        _sized(name, module, *shapes[name])
        for name, module in model.named_modules()
        if isinstance(module, Weighted) and name in shapes
    ]
    rest = count_macs(model, example_inputs) - round(sum(macs(x, x.cin, x.cout) for x in found))
    if rest > 0:
        found.append(SizedLayer("", "rest", 0, 0, (1,), (1,), (0,), (1,), 1, (1,), (1,), bias=False, maps=rest))
    return tuple(found)


def _sized(name: str, module: Weighted, before: torch.Size, after: torch.Size) -> SizedLayer:
    if isinstance(module, nn.Linear):
        tokens = (1, after[:-1].numel())
        sizes = ((1, 1), (1, 1), (0, 0), (1, 1))
        has_bias = module.bias is not None
        return SizedLayer(name, "linear", *in_and_out(module), *sizes, 1, tokens, tokens, has_bias)
    padding = module.padding
    if isinstance(padding, str):
        same = [d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = tuple(same) if padding == "same" else (0,) * len(same)
    return SizedLayer(
        name, "depthwise" if is_depthwise(module) else "conv", *in_and_out(module), tuple(module.kernel_size),
        tuple(module.stride), tuple(padding), tuple(module.dilation), module.groups, tuple(before[2:]),
        tuple(after[2:]), module.bias is not None, maps=after[0], transposed=isinstance(module, _ConvTransposeNd),
    )  # fmt: skip


def in_and_out(module: nn.Module) -> tuple[int, int]:
    """(channels it reads, channels it puts out)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, Convolution)
    return module.in_channels, module.out_channels


def is_depthwise(module: nn.Module) -> bool:
    """One filter, or several, for each input channel: the channels come and go with their producer's."""
    return isinstance(module, Convolution) and 1 < module.groups == module.in_channels


def channels_read(layer: nn.Module) -> int | None:
    """How many channels a layer that can be cut reads; None for any other."""
    if isinstance(layer, Convolution):
        kind = next(c for c in type(layer).__mro__ if c in get_args(Convolution))
        return layer.in_channels if plain(layer, kind) or named(layer, ("Conv2dSame",)) else None
    if isinstance(layer, nn.Linear):
        return layer.in_features if type(layer).forward is nn.Linear.forward else None
    if is_batch_norm(layer) or isinstance(layer, _InstanceNorm):
        return int(layer.num_features)  # type: ignore[arg-type]
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels if layer.num_groups > 1 else None
    return layer.num_parameters if isinstance(layer, nn.PReLU) and layer.num_parameters > 1 else None


def rank_read(layer: nn.Module) -> int | None:
    """The dimensions of what a layer reads as a batch, where that is one number alone."""
    if isinstance(layer, Convolution):
        return layer.weight.dim()
    return layer._get_no_batch_dim() + 1 if isinstance(layer, _InstanceNorm) else None


def output_dim(module: nn.Module, tensor: str) -> int:
    """The dimension of a layer's tensor along which the channels lie that it puts out; a weight's other one is what it reads."""
    return int(tensor == "weight" and isinstance(module, _ConvTransposeNd) and not is_depthwise(module))


def slices_of(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> dict[str, Slices]:
    """{own tensor of a layer: what stays of it}; `rows`, `columns`: bool masks over what it puts out and reads, None where all stay."""
    groups = getattr(module, "groups", 1)
    found = {}
    for name, tensor in own_tensors(module):
        first, second = rows, None
        if name == "weight" and isinstance(module, Weighted):
            first, second = (columns, rows) if isinstance(module, _ConvTransposeNd) else (rows, columns)
            # along the second dimension each convolution group has the same positions; a depthwise layer has but one
            second = None if second is None or is_depthwise(module) else second.view(groups, -1)[0]
        along = ((dim, mask) for dim, mask in enumerate((first, second)) if mask is not None and not bool(mask.all()))
        mine = tuple((dim, mask.nonzero().flatten()) for dim, mask in along)
        if mine and tensor.dim() > 0:
            found[name] = mine
    return found


def set_width(module: nn.Module, side: str, width: int) -> None:
    """Make a layer's own numbers agree with its tensors, in place: so many channels are what it reads ("in") or puts out ("out") now."""
    if side == "in":
        if is_depthwise(module):
            module.groups = width  # type: ignore[assignment]
        if isinstance(module, Weighted):
            setattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels", width)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups, module.num_channels = module.num_groups * width // module.num_channels, width
    else:
        names = ("out_features", "out_channels", "num_features", "num_parameters")
        for name in names:
            if hasattr(module, name):
                setattr(module, name, width)


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """The layer's weight, with its gradient."""
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight


def by_output(module: nn.Module, values: Tensor) -> Tensor:
    """[c_out, c_in / groups, ...] of `values` shaped as the layer's weight, which a transposed convolution has the other way round."""
    if not isinstance(module, _ConvTransposeNd):
        return values
    parts = values.view(module.groups, -1, *values.shape[1:]).transpose(1, 2)
    return parts.reshape(module.out_channels, -1, *values.shape[2:])


def channel_rows(x: Tensor, layer: nn.Module) -> Tensor:
    """[c, n]: what a layer reads or gives by channels, dimension 1 of a map and the last one of a linear layer's."""
    return x.reshape(-1, x.shape[-1]).t() if isinstance(layer, nn.Linear) else x.transpose(0, 1).flatten(1)


def by_input(module: nn.Module, rows: Tensor) -> Tensor:
    """[c_in]: the sum, for each input channel, of `rows` as `by_output` has them (convolution groups taken apart)."""
    groups = getattr(module, "groups", 1)
    return rows.reshape(groups, len(rows) // groups, rows.shape[1], -1).sum(dim=(1, 3)).flatten()
