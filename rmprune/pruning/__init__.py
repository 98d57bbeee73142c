"""Which channels go, and their removal: importance, budgets, surgery, cuts while training, the coupled baseline."""

from rmprune.pruning.allocate import allocate
from rmprune.pruning.budget import Budget
from rmprune.pruning.coupled import prune_coupled
from rmprune.pruning.dead import fold_dead_channels
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.gradual import GradualPruner
from rmprune.pruning.importance import IMPORTANCES
from rmprune.pruning.one_shot import prune
from rmprune.pruning.surgery import shrink
from rmprune.pruning.taylor_sum import TaylorSum

__all__ = [
    "IMPORTANCES", "Budget", "GradualPruner", "TaylorSum", "allocate", "find_structure", "fold_dead_channels", "prune",
    "prune_coupled", "shrink",
]  # fmt: skip
