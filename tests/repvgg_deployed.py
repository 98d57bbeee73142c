"""The plain form of RepVGG by its own formula (RM.md section 7): what `rmprune.remove_residuals` makes of it is compared with this."""

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rmprune.models.repvgg import RepVGG, RepVGGBlock, SqueezeExcitation


def _folded(weight: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a bias-free convolution followed by `bn` in eval mode."""
    assert bn.running_mean is not None and bn.running_var is not None
    return fuse_conv_bn_weights(weight, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)


@torch.no_grad()
def deployed_convolution(block: RepVGGBlock, like: Tensor) -> nn.Conv2d:
    """The one 3x3 convolution that equals a block in eval mode up to its gate and ReLU; dtype and device of `like`.

    Rows R on: W3' + pad(W1') + Dirac', the batch norms folded in; the first R rows are Dirac (RM.md section 7).
    """
    reserved, channels = block.reserved, block.channels
    computes = reserved < channels
    in_channels, stride = (block.conv3.in_channels, block.conv3.stride[0]) if computes else (channels, 1)
    conv = nn.Conv2d(in_channels, channels, 3, stride, 1).to(like)
    dirac = nn.init.dirac_(torch.empty_like(conv.weight))
    weight, shift = dirac.clone(), like.new_zeros(channels)
    if computes:
        kernel, bias = _folded(block.conv3.weight, block.bn3)
        pointwise, pointwise_bias = _folded(block.conv1.weight, block.bn1)
        kernel, bias = kernel + F.pad(pointwise, (1, 1, 1, 1)), bias + pointwise_bias
        if block.bn0 is not None:
            passed, passed_bias = _folded(dirac[reserved:], block.bn0)
            kernel, bias = kernel + passed, bias + passed_bias
        weight[reserved:], shift[reserved:] = kernel, bias
    conv.load_state_dict({"weight": weight, "bias": shift})
    return conv


@torch.no_grad()
def deployed_gate(gate: SqueezeExcitation) -> SqueezeExcitation:
    """A gate of all channels that equals `gate`: reserved ones get sigmoid(100), which is 1 in every float format."""
    channels = gate.down.in_channels
    full = SqueezeExcitation(channels, gate.down.out_channels).to(gate.up.weight)
    full.down.load_state_dict(gate.down.state_dict())
    weight, bias = torch.zeros_like(full.up.weight), gate.up.weight.new_full((channels,), 100.0)
    weight[gate.reserved :], bias[gate.reserved :] = gate.up.state_dict().values()
    full.up.load_state_dict({"weight": weight, "bias": bias})
    return full


def deploy(model: RepVGG) -> nn.Sequential:
    """The plain form of `model` in eval mode: a 3x3 convolution and a ReLU for each block; `model` is left alone.

    Exact: equal to `model.eval()` within rounding for every input. With squeeze-and-excitation the gates stay.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, block in model.named_modules():
        if isinstance(block, RepVGGBlock):
            name = name.replace(".", "_")
            layers[f"{name}_conv"] = deployed_convolution(block, model.fc.weight)
            if block.se is not None:
                layers[f"{name}_se"] = deployed_gate(block.se)
            layers[f"{name}_relu"] = nn.ReLU(inplace=True)
    layers |= {name: copy.deepcopy(getattr(model, name)) for name in ("pool", "flatten", "fc")}
    return nn.Sequential(layers).eval()
