"""What a training refuses: networks that cannot be trained, and values that are no numbers any more. It trains nothing."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from rmprune.config import require
from rmprune.errors import RmpruneError
from rmprune.graph.finite import broken_on, broken_tensor
from rmprune.training.state import TrainState


def check_trainable(model: nn.Module) -> None:
    """Raises ConfigError for a network without weights, or with weights in which small steps are lost."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    require(len(learning) > 0, "the network has no weights to train")
    check_precision(learning)


def check_precision(weights: Iterable[Tensor]) -> None:
    """Raises ConfigError for weights in which small steps are lost."""
    for kind in {tensor.dtype for tensor in weights} - {torch.float32, torch.float64}:
        name = str(kind).removeprefix("torch.")
        require(
            False, f"weights in {name} are too coarse to train: pass model.float(), with precision='bfloat16' for speed"
        )


def begins(model: nn.Module, teacher: nn.Module | None, x: Tensor | None) -> str:
    """Where values stop being finite, in words and brackets. x: the images that it comes from, where they are at hand."""
    if x is None:
        where = broken_tensor(model)
    else:
        where = broken_on(model, x)
        if where is None and teacher is not None:
            where = broken_on(teacher, x)
            where = where and f"of the teacher, {where}"
    return f" ({where})" if where else ""


def not_finite(
    what: str, where: str, state: TrainState, step: int, checkpoint: Path | None, saved: int | None
) -> RmpruneError:
    """The error for values that are not finite at a step: where that begins, what is left, what to do. saved: step of the checkpoint."""
    good = (
        "no good checkpoint was written"
        if saved is None
        else f"the last good checkpoint is {checkpoint}, of step {saved}"
    )
    return RmpruneError(
        f"{what} no longer finite at step {step} of {state.total_steps} ({state.steps_per_epoch} an epoch){where}; {good}; lower "
        f"learning_rate (now {state.config.learning_rate:g}), lengthen warmup_epochs, or lower clip_norm"
    )


def one_value(error: ValueError, label: str) -> Exception:
    """What to raise for torch's error about a batch norm that sees one value a channel; any other as it is."""
    if "more than 1 value per channel" not in str(error):
        return error
    return RmpruneError(
        f"{label}: a batch norm cannot train on one value a channel: take a larger batch_size, or larger images"
    )
