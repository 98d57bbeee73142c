"""The optimizer and its learning-rate schedule; no loop."""

import math

import torch
from torch import nn

from rmprune.config import TrainConfig
from rmprune.models.head import head_parameters

SHORTCUT_SCALE = "shortcut_scale"  # the name of the depthwise layers that training.sparsity puts on shortcuts


def parameter_groups(model: nn.Module, weight_decay: float, head_rate: float = 1.0) -> list[dict]:
    """Weights of convolutions and linear layers decay; biases, norms, PReLU slopes and shortcut scales do not.

    `rate` of a group is the factor of its learning rate: `head_rate` for the last layer, 1 for all others.
    """
    head = set(head_parameters(model)) if head_rate != 1 else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_scale = parameter.ndim <= 1 or name.split(".")[-2:-1] == [SHORTCUT_SCALE]
        key = (0.0 if is_scale else weight_decay, head_rate if name in head else 1.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": found, "weight_decay": decay, "rate": rate} for (decay, rate), found in groups.items()]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum over `parameter_groups`; a hook that replaces the model may call it."""
    groups = parameter_groups(model, config.weight_decay, config.head_rate)
    for group in groups:
        # Several at once but where Nesterov's step is then written into the gradients, which hooks read after it. Never fused: that takes
        # momentum in another memory order than its weight's.
        group["foreach"] = group["weight_decay"] > 0
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of step 0 <= step < epochs * steps_per_epoch: linear warm-up, then cosine or constant."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def total_learning_rate(config: TrainConfig, steps_per_epoch: int) -> float:
    """The sum of the learning rates of all steps: what strengths that are stated for a whole run are divided by."""
    return math.fsum(learning_rate(config, step, steps_per_epoch) for step in range(config.epochs * steps_per_epoch))
