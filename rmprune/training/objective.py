"""What a training minimises on one batch: the cross entropy of classes, or somebody's own loss, and the teacher's part of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rmprune.config import TrainConfig
from rmprune.data.batches import Loss, check_labels, own_loss
from rmprune.graph.run import hooked
from rmprune.graph.tensors import tensors_in
from rmprune.training.precision import ask
from rmprune.training.teacher import distillation_loss

Teaching = Callable[..., Any] | None


def class_objective(
    model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None, config: TrainConfig, weights: Tensor | None,
    part: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of images x with class numbers y [B], and how many were right; `target`: the teacher's logits [B, C].

    `weights` [C]: of classes, 1 on average over all training images; each image's loss, the teacher's part with it, counts by that of its
    class, whoever else is in its batch. `part`: of several processes, what `part_of_all` says of the images here; the mean of all losses is
    then that of the whole batch, however it is divided.
    """
    output = ask(model, x)
    if y.device.type == "cpu":  # a GPU is not waited for; it stops by itself
        check_labels(y, output.shape[1])
    own = None if weights is None else weights[y]
    if own is None:
        loss = nn.functional.cross_entropy(output.float(), y, label_smoothing=config.label_smoothing)
    else:  # the mean over the batch's own weights would take them out again where a class is alone
        each = nn.functional.cross_entropy(output.float(), y, reduction="none", label_smoothing=config.label_smoothing)
        loss = (own * each).mean()
    if target is not None:
        soft = distillation_loss(output, target, config.temperature, own)
        loss = (1 - config.distillation) * loss + config.distillation * soft
    return loss if part is None else loss * part, (output.detach().argmax(1) == y).sum()


def own_objective(
    model: nn.Module, batch: Any, loss: Loss, teacher: Teaching, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """The loss of a batch of any form, and NaN, since nothing is right or wrong.

    The teacher gets what the network was given, in each call that the loss makes, and its part is the mean of `apart`. Network and loss
    may write over what they get.
    """
    given: list[tuple[Any, ...]] = []  # of calls that are not over
    calls: list[tuple[tuple[Any, ...], list[Tensor]]] = []

    def begin(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(tree_map_only(Tensor, torch.clone, inputs))

    def end(_: nn.Module, __: Any, output: Any) -> None:
        calls.append((given.pop(), [x.clone() for x in tensors_in(output)]))

    with hooked((model.register_forward_pre_hook(begin), model.register_forward_hook(end))):
        value = own_loss(loss, model, batch)
    if teacher is not None and config.distillation:
        with torch.no_grad():
            targets = [teacher(*inputs) for inputs, _ in calls]
        soft = torch.stack([apart(output, target) for (_, output), target in zip(calls, targets, strict=True)]).mean()
        value = (1 - config.distillation) * value + config.distillation * soft
    return value, torch.full_like(value.detach(), torch.nan)


def apart(student: Any, teacher: Any) -> Tensor:
    """How far outputs (a tensor, or several) are from the teacher's: the squared difference over the teacher's variance; means, no unit."""
    pairs = [
        (s.float(), t.float())
        for s, t in zip(tensors_in(student), tensors_in(teacher), strict=True)
        if t.is_floating_point()
    ]
    return torch.stack([(s - t).square().mean() / t.var(correction=0).clamp(min=1e-12) for s, t in pairs]).mean()
