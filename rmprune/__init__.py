"""rmprune: remove residual connections exactly (RM), prune the plain network freely, measure what it really gains."""

from rmprune import models
from rmprune.artifact import load, save
from rmprune.errors import RmpruneError
from rmprune.measure import count_macs, count_params, measure_latencies, measure_latency
from rmprune.pipelines.one_call import slim
from rmprune.pruning import Budget, prune
from rmprune.pruning.collapse import Collapse, collapse_blocks
from rmprune.pruning.own_loop import Pruner
from rmprune.removal import Removal, plan_removal, remove_residuals

__all__ = [
    "Budget",
    "Collapse",
    "Pruner",
    "Removal",
    "RmpruneError",
    "collapse_blocks",
    "count_macs",
    "count_params",
    "load",
    "measure_latencies",
    "measure_latency",
    "models",
    "plan_removal",
    "prune",
    "remove_residuals",
    "save",
    "slim",
]
