"""What the training loop shows to its hook, and what a hook may change; no behaviour."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from rmprune.config import TrainConfig


@dataclasses.dataclass
class TrainState:
    """What a hook sees, after backward and the optimizer's step; the gradients of the step are still there.

    A hook may put another `model` here (a smaller one, say), and an `optimizer` for it; without one, `make_optimizer`
    makes it. It may also change the model's parameters in place.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    steps_per_epoch: int
    total_steps: int
    learning_rate_sum: float  # of all steps of the run
    step: int = 0  # steps done, this one included
    learning_rate: float = 0.0  # of this step

    @property
    def epoch(self) -> int:
        """The epoch of this step, from 0."""
        return max(0, self.step - 1) // self.steps_per_epoch


Hook = Callable[[TrainState], None]
