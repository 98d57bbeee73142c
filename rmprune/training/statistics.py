"""Running statistics of batch norms, measured on the weights as they are.

While weights move, a running mean is one of networks that are gone. At the rates of fine-tuning that can ruin evaluation where training
is well: EfficientNet-Lite0 in MobileNetV1's form, after its first epoch, had a validation loss of 8.1 with them (reports/README.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from rmprune.data.batches import Loss
from rmprune.training.precision import ask

MOST_IMAGES = 1024  # a quarter of an epoch, where that is less, is enough


def measure_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Any]], loss: Loss | None = None) -> None:
    """Give the batch norms of `model`, in place, the mean and variance that these batches have on average (Wu and Johnson 2021).

    `batches`: (x [B, C, ...], y) as a split yields them, on the model's device; a `loss` of one's own is what runs the model on y.
    Everything is in training mode, as in a step; the mode is left as it was.
    """
    update_bn(([batch] for batch in batches), _Step(model, loss))


class _Step(nn.Module):
    """What one step of training computes of a batch (x, y)."""

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.training = model.training

    def forward(self, batch: tuple[Tensor, Any]) -> Tensor:
        return ask(self.model, batch[0]) if self.loss is None else self.loss(self.model, batch[1])
