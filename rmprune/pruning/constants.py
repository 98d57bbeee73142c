"""Which channels of a network are constant, and what a constant adds to the layer that reads it. Cuts nothing."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from rmprune.graph.network import NodeLayer, named, shape_of
from rmprune.graph.ranges import annotate_ranges, range_of
from rmprune.pruning.layers import Convolution, Weighted, by_output, in_and_out
from rmprune.pruning.reading import Reading


@dataclass(frozen=True)
class Constants:
    """`inputs`: {convolution or linear layer: [c_in] float64, the constant of each input channel, NaN where it is none}.
    `norms_behind`: {such a layer: the batch norm that alone reads its output}."""

    inputs: Mapping[str, Tensor]
    norms_behind: Mapping[str, str]


def find_constants(model: nn.Module, reading: Reading) -> Constants:
    """Constants of every layer's inputs: the channels whose interval, for every input of the network, is a point.

    `reading`: of this network with its values, or of one from which it was cut.
    """
    network = reading.of(model)
    for target, norm in network.layers.items():
        if to_be_trained(norm):
            awake = copy.deepcopy(norm)
            nn.init.ones_(awake.weight)
            network.layers[target] = awake
    annotate_ranges(network, rounding=0.0)  # so that the two ends of a constant are one number
    inputs = {}
    for node in network.graph.nodes:
        layer, name = network.layer(node), reading.name(node)
        if name is None or not isinstance(layer, Weighted):
            continue
        source = node.all_input_nodes[0]
        inputs[name] = torch.full((in_and_out(layer)[0],), torch.nan, dtype=torch.float64)
        # Otherwise what it reads are not the channels that ranges speak of.
        if len(shape_of(source) or ()) == layer.weight.dim():
            low, high = range_of(source)
            inputs[name] = torch.where(low == high, low, torch.nan)
    return Constants(inputs, norms_behind(reading))


def norms_behind(reading: Reading) -> dict[str, str]:
    """{convolution or linear layer: the batch norm with statistics that alone reads its output}."""
    found = {}
    for norm, layer in reading.joined_norms().items():
        if getattr(reading.network.layer(norm), "running_mean", None) is not None:
            found[str(reading.name(layer))] = str(reading.name(norm))
    return found


def is_padded(conv: nn.Module) -> bool:
    """Whether some positions see zeros instead of the channel: padding of zeros, or what transposed convolutions put between."""
    if isinstance(conv, _ConvTransposeNd):
        return True
    if isinstance(conv, nn.Conv2d) and named(conv, ("Conv2dSame",)):  # its forward pads, by what strides leave over
        return any(k > 1 or s > 1 for k, s in zip(conv.kernel_size, conv.stride, strict=True))
    if not isinstance(conv, Convolution) or conv.padding_mode != "zeros":
        return False
    if isinstance(conv.padding, str):
        return conv.padding == "same" and any(k > 1 for k in conv.kernel_size)
    return any(p != 0 for p in conv.padding)


def response(layer: nn.Module, values: Tensor) -> Tensor:
    """[c_out]: what the layer adds to its outputs for constant inputs `values` [c_in], away from the border; no
    bias. Of a transposed convolution the mean over positions.
    """
    assert isinstance(layer, Weighted)
    rows = by_output(layer, layer.weight.detach()).double()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    taps = rows.reshape(groups, len(rows) // groups, rows.shape[1], -1).sum(3)
    added = (taps @ values.double().to(taps.device).view(groups, -1, 1)).flatten()
    return added / math.prod(layer.stride) if isinstance(layer, _ConvTransposeNd) else added


def to_be_trained(norm: NodeLayer | None) -> TypeGuard[_BatchNorm]:
    """Whether every scale of a batch norm is 0 that has seen no batch: so branches start (zero_init_residual), not so they end."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None or norm.weight is None:
        return False
    return not bool(norm.weight.any()) and not bool(norm.running_mean.any()) and bool((norm.running_var - 1 == 0).all())


def add_to_bias(model: nn.Module, layer: str, delta: Tensor, follower: str | None) -> None:
    """Add `delta` [c_out] to what the layer puts out, in place: through its batch norm's mean where there is one, else its bias."""
    module = model.get_submodule(layer)
    assert isinstance(module, Weighted)
    with torch.no_grad():
        if module.bias is None and follower is not None:
            mean = model.get_submodule(follower).running_mean
            assert isinstance(mean, Tensor)
            mean -= delta.to(mean)
        elif module.bias is None:
            module.bias = nn.Parameter(delta.to(module.weight))
        else:
            module.bias += delta.to(module.bias)
