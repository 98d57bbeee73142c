"""Batch norms of a fitted network, given the statistics of what reaches them now; the function stays as it is.

A cut and a least-squares fit leave every batch norm with the mean and variance of the network before the cut. In eval mode nothing
is wrong: the fit was made with them. But training mode takes those of the batch, so the first step of fine-tuning would compute
another function than the fitted one. Re-centred, the two modes differ only as one batch differs from all images.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmprune.graph.copied import copied
from rmprune.graph.listed import holders, trace
from rmprune.graph.run import evaluating, hooked, on_copies
from rmprune.graph.tensors import own_tensors


@torch.no_grad()
def recentre(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of `model` with the mean and variance of these images (B, C, ...) in its batch norms, the same function in eval mode.

    Scale and shift take up what the statistics move by. A batch norm without scale and shift, or that no image reaches, stays, and so
    does one whose tensors something else reads, too. Raises UnsupportedModel where torch.fx cannot follow.
    """
    model = copied(model)
    held = holders(model, trace(model))
    moments: dict[_BatchNorm, Moments] = {}
    watched = [
        norm
        for norm in model.modules()
        if isinstance(norm, _BatchNorm)
        and norm.affine
        and norm.running_mean is not None
        and all(held[id(own)] == 1 for _, own in own_tensors(norm))
    ]

    def note(norm: _BatchNorm, args: tuple[Tensor, ...]) -> None:
        moments.setdefault(norm, Moments()).add(args[0])

    with evaluating(model), hooked(norm.register_forward_pre_hook(note) for norm in watched):
        for images in batches:
            on_copies(model, images)
    for norm, found in moments.items():
        _move(norm, found.mean, found.square / found.count)
    return model


class Moments:
    """Count, mean (C,) and sum of squared deviations (C,) of maps (N, C, ...) that come batch by batch, in float64 (Chan et al. 1979)."""

    count = 0
    mean: Tensor
    square: Tensor

    def add(self, x: Tensor) -> None:
        x = x.detach().double()
        others = [dim for dim in range(x.dim()) if dim != 1]
        count, mean = x.numel() // x.shape[1], x.mean(others)
        square = x.var(others, correction=0) * count
        if self.count == 0:
            self.count, self.mean, self.square = count, mean, square
            return
        apart, whole = mean - self.mean, self.count + count
        self.square = self.square + square + apart.square() * (self.count * count / whole)
        self.mean = self.mean + apart * (count / whole)
        self.count = whole


def _move(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    norm.weight.copy_(gain * torch.sqrt(variance + norm.eps))
    norm.bias.copy_(norm.bias.double() + gain * (mean - norm.running_mean.double()))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
