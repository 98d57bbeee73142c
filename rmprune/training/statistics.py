"""Running statistics of batch norms, measured on the weights as they are.

While weights move, a running mean is one of networks that are gone. At the rates of fine-tuning that can ruin evaluation where training
is well: EfficientNet-Lite0 in MobileNetV1's form, after its first epoch, had a validation loss of 8.1 with them (reports/recentring).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmprune.data.batches import Loss, own_loss
from rmprune.training.precision import ask

MOST_IMAGES, LEAST_IMAGES = 1024, 256  # that they are measured on, in whole batches


def images_for_statistics(images: int, *, last: bool) -> int:
    """How many of this many training images are enough: after the last epoch MOST_IMAGES; before, a quarter, so that it costs little."""
    return MOST_IMAGES if last else min(MOST_IMAGES, max(LEAST_IMAGES, images // 4))


@torch.no_grad()
def measure_statistics(
    model: nn.Module, batches: Iterable[tuple[Tensor, Any]], loss: Loss | None = None, images: int = MOST_IMAGES
) -> None:
    """Give the batch norms of `model`, in place, the mean and variance that the first `images` of these have on average by batch (Wu
    and Johnson 2021), each batch counted by its size.

    `batches`: (x [B, C, ...], y) as a split yields them, on the model's device; with a `loss` of one's own, that runs the model on y.
    The network is in training mode, as in a step, and each module's own mode is put back. A batch norm that a step leaves alone is left
    alone: one that `train()` does not reach, one of momentum 0, one without statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    momenta = [(norm, norm.momentum) for norm in norms if norm.momentum != 0]
    sizes = dict.fromkeys(norms, 0)

    def weigh(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        """Its part in the average of all: a last batch may be of a single image."""
        own = inputs[0].numel()
        sizes[norm] += own
        norm.momentum = own / sizes[norm]

    hooks = [norm.register_forward_pre_hook(weigh) for norm, _ in momenta]
    try:
        for norm, _ in momenta:
            norm.reset_running_stats()
        seen = 0
        for x, y in batches if momenta else ():
            ask(model, x) if loss is None else own_loss(loss, model, y)
            seen += len(x)
            if seen >= images:
                break
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
