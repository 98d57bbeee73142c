"""Training, evaluation and sparsity; nothing here removes or prunes."""

from rmprune.training.evaluation import Evaluation, evaluate
from rmprune.training.loop import Hook, TrainState, fit
from rmprune.training.optimizer import make_optimizer

__all__ = ["Evaluation", "Hook", "TrainState", "evaluate", "fit", "make_optimizer"]
