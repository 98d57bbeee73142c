"""Accuracy and loss of a model on a split; no training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rmprune.config import Precision
from rmprune.data.splits import Split
from rmprune.errors import RmpruneError
from rmprune.graph.finite import where_broken
from rmprune.graph.foreign import copied
from rmprune.training.precision import ask, autocast, weights_dtype


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` from 0 to 1; `loss` is the mean cross-entropy, without label smoothing."""

    accuracy: float
    loss: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    limit: int | None = None,
    precision: Precision = "float32",
) -> Evaluation:
    """Evaluate in eval mode on the split's first `limit` images (all by default); the model is left in the mode it had.

    The model must be on `device` already. Raises RmpruneError where its outputs are NaN, and says where that begins.
    """
    device = torch.device(device)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    correct, loss, seen = (torch.zeros((), device=device, dtype=torch.float64) for _ in range(3))
    try:
        with autocast(precision, device):
            for x, y in split.batches(batch_size, device=device, memory_format=torch.channels_last, limit=limit):
                output = ask(model, x).float()
                correct += (output.argmax(1) == y).sum()
                loss += nn.functional.cross_entropy(output, y, reduction="sum")
                seen += len(y)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    if loss.isnan():
        where = where_broken(copied(model).eval(), (x.to(weights_dtype(model, x.dtype)),)) or "in some batches alone"
        raise RmpruneError(f"the network cannot be evaluated, its outputs are NaN: {where}")
    return Evaluation(float(correct / seen), float(loss / seen))
