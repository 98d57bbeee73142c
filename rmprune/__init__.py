"""rmprune: remove residual connections exactly (RM), prune the plain network freely, measure what it really gains.

What stands here is imported when it is asked for: the command line and its reports need no torch to start.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmprune import models as models
    from rmprune.artifact import load as load
    from rmprune.artifact import save as save
    from rmprune.errors import RmpruneError as RmpruneError
    from rmprune.measure import count_macs as count_macs
    from rmprune.measure import count_params as count_params
    from rmprune.measure import measure_latencies as measure_latencies
    from rmprune.measure import measure_latency as measure_latency
    from rmprune.pipelines.one_call import slim as slim
    from rmprune.pruning import Budget as Budget
    from rmprune.pruning import prune as prune
    from rmprune.pruning.collapse import Collapse as Collapse
    from rmprune.pruning.collapse import collapse_blocks as collapse_blocks
    from rmprune.pruning.own_loop import Pruner as Pruner
    from rmprune.removal import Removal as Removal
    from rmprune.removal import plan_removal as plan_removal
    from rmprune.removal import remove_residuals as remove_residuals

_ROOMS = {
    "artifact": ("load", "save"),
    "errors": ("RmpruneError",),
    "measure": ("count_macs", "count_params", "measure_latencies", "measure_latency"),
    "pipelines.one_call": ("slim",),
    "pruning": ("Budget", "prune"),
    "pruning.collapse": ("Collapse", "collapse_blocks"),
    "pruning.own_loop": ("Pruner",),
    "removal": ("Removal", "plan_removal", "remove_residuals"),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["models", *_HOMES]


def __getattr__(name: str) -> Any:
    """A public name, or a room: `rmprune.prune`, `rmprune.config`."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name.startswith("__"):  # what Python asks modules for; `__main__` would run the command line
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
