"""The order in memory in which a network reads images: channels last, where its code allows it. No training or timing here."""

import torch
from torch import Tensor, nn

from rmprune.graph.run import evaluating, on_copies
from rmprune.graph.tensors import device_of, floating_dtype


def memory_order(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Channels last, in which convolutions are fastest, where the network takes images [N, C, H, W] so; else contiguous.

    `x.view(len(x), -1)` reads maps as they lie, and fails on these. Tried on two of the images, in eval mode, with the weights in the order
    that they have; a network that fails in any order does so where it is used.
    """
    x = images[:2].to(device_of(model), floating_dtype(model, images.dtype) if images.is_floating_point() else None)
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            on_copies(model, in_order(x, torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def in_order(x: Tensor, order: torch.memory_format) -> Tensor:
    """A batch in this order, if it is one of images [N, C, H, W]."""
    return x.contiguous(memory_format=order) if x.dim() == 4 else x
