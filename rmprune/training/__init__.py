"""Training, evaluation and sparsity; nothing here removes or prunes."""

from rmprune.training.evaluation import Evaluation, evaluate
from rmprune.training.loop import fit
from rmprune.training.optimizer import make_optimizer
from rmprune.training.state import Hook, TrainState

__all__ = ["Evaluation", "Hook", "TrainState", "evaluate", "fit", "make_optimizer"]
