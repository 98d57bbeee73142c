"""Rows of convolutions before batch norms, scaled so that no row runs ahead of the others in fine-tuning; the function stays as it is.

A batch norm takes the length of the rows before it out again: multiplied by k they compute the same, their gradient is k times smaller, and
a step turns them k squared times less. A network without residuals carries its streams through such rows, and what turns one of them goes
through all layers behind: cut to a fifth of its MACs, EfficientNet-Lite0 began with a gradient a hundred times that of the same network
with residuals, and its first step undid the fit (reports/solar-cells, experiments/first_steps.py).
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmprune.data.batches import Batches, loss_parts
from rmprune.graph.convolution import plain
from rmprune.graph.copied import copied
from rmprune.graph.foreign import HOOKS
from rmprune.graph.listed import holders, trace
from rmprune.graph.run import evaluating
from rmprune.graph.tensors import own_tensors
from rmprune.training.convolutions import TrainableConvolutions

AHEAD = 16  # times the median: networks with residuals have hardly a row that is turned faster
PASSES = 2  # a row's gradient changes with the rows before it
MOST_DOUBLINGS = 8.0  # of a row: where early gradients vanish the median is no measure
BATCHES = 4  # that gradients are measured on
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def balance(model: nn.Module, batches: Batches) -> nn.Module:
    """A copy of `model`, the same function, in which no row is turned much faster than the median, relative to its length. The same in
    training mode as well, to rounding where a batch has the variances that the batch norms know, or these are large beside `eps`.

    Rows that are turned over AHEAD times as fast are multiplied by powers of two until they are turned like the median; mean, variance and
    scale of the batch norm behind take that up. All others stay as they are, to the last bit, as do rows that cannot turn (of one weight,
    or all zero) or whose gradient is not finite, and convolutions that something else reads as well, or that are called more than once.
    batches: of images whose loss says what turns a row, with these batch norms in training mode, all else in eval mode. Raises
    UnsupportedModel where torch.fx cannot follow.
    """
    model = copied(model)
    pairs = list(_pairs(model))
    for _ in range(PASSES if pairs else 0):
        gradients = _gradients(model, pairs, batches)
        relative = [_relative(found, conv.weight.detach()) for found, (conv, _) in zip(gradients, pairs, strict=True)]
        turning = [value for own in relative for value in own.tolist() if value > 0]
        middle = statistics.median(turning) if turning else float("inf")
        for (conv, norm), own in zip(pairs, relative, strict=True):
            ahead = (own / middle).where(own > AHEAD * middle, 1.0)
            _scale(conv, norm, torch.exp2(ahead.log2().div(2).round().clamp_max(MOST_DOUBLINGS)))
    return model


def _relative(gradient: Tensor, weight: Tensor) -> Tensor:
    """[rows]: gradients relative to lengths; 0 for rows of zeros or of one weight, and where a gradient is not finite."""
    length = weight.flatten(1).double().norm(dim=1)
    turns = gradient.isfinite() & (length > 1e-12) & (weight[0].numel() > 1)
    return torch.where(turns, gradient / length, 0.0)


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Conv2d, _BatchNorm]]:
    """Convolutions (of any rank) that a batch norm alone reads, each with it."""
    graph = trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    held = holders(model, graph)
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        conv, norm = modules[str(source.target)], modules[str(node.target)]
        alone = all(calls[m] == 1 and all(held[id(own)] == 1 for _, own in own_tensors(m)) for m in (conv, norm))
        stock = any(type(conv) is kind and plain(conv, kind) for kind in _CONVS)
        changed = (
            any(getattr(m, hooks) for m in (conv, norm) for hooks in HOOKS)
            or "forward" in conv.__dict__ | norm.__dict__
        )
        if not isinstance(norm, _BatchNorm) or not norm.affine or norm.running_mean is None:
            continue
        if isinstance(norm, nn.SyncBatchNorm):  # in training mode it waits for other processes
            continue
        if stock and alone and not changed and conv.weight.requires_grad:
            yield conv, norm


def _gradients(model: nn.Module, pairs: list[tuple[nn.Conv2d, _BatchNorm]], batches: Batches) -> list[Tensor]:
    """[rows] for each convolution: the root of the summed squares, over batches, of the gradient of each row's weights."""
    kept = [(norm, {name: value.clone() for name, value in norm.named_buffers()}) for _, norm in pairs]
    weights = [conv.weight for conv, _ in pairs]
    squares = [torch.zeros(len(weight), dtype=torch.float64, device=weight.device) for weight in weights]
    with evaluating(model), torch.enable_grad(), TrainableConvolutions():
        for norm, _ in kept:
            norm.train()
        for run, _ in itertools.chain.from_iterable(itertools.islice(loss_parts(batches, model), BATCHES)):
            try:
                found = torch.autograd.grad(run(), weights, allow_unused=True)
            except ValueError:  # a single image whose map is a single pixel: it has no variance
                continue
            for square, own in zip(squares, found, strict=True):
                if own is not None:
                    square += own.flatten(1).double().square().sum(1)
    for norm, buffers in kept:
        for name, value in buffers.items():
            norm.get_buffer(name).copy_(value)
    return [square.sqrt() for square in squares]


@torch.no_grad()
def _scale(conv: nn.Conv2d, norm: _BatchNorm, factor: Tensor) -> None:
    """Multiplies the rows, and what the norm knows of them; its scale takes up what `eps` is no longer beside a larger variance."""
    assert norm.running_mean is not None and norm.running_var is not None
    variance = norm.running_var.double()
    factor = torch.where(variance * factor.square() < torch.finfo(norm.running_var.dtype).max, factor, 1.0)
    gain = torch.sqrt(variance * factor.square() + norm.eps) / (torch.sqrt(variance + norm.eps) * factor)
    norm.weight.copy_(norm.weight.double() * gain)
    conv.weight.mul_(factor.to(conv.weight).view(-1, *[1] * (conv.weight.dim() - 1)))
    if conv.bias is not None:
        conv.bias.mul_(factor.to(conv.bias))
    norm.running_mean.mul_(factor.to(norm.running_mean))
    norm.running_var.copy_(variance * factor.square())
