"""Settings that stand in a run's config and that nothing in it reads: for one line of the log, and for the record. Refuses nothing."""

import logging
from dataclasses import fields

from rmprune.amc.table import AMC_METHODS
from rmprune.config import AmcConfig, RunConfig, SlimConfig
from rmprune.methods.table import find_methods

logger = logging.getLogger("rmprune")
_OF_NETWORKS = {"sparsity.shortcut_scales"}
"""Settings that say which layers there are, in a checkpoint too."""


def unread(config: RunConfig) -> dict[str, str]:
    """{path of a setting that is not the default: why nothing reads it}, of training, removal and search.

    A file of settings may be for several runs, of which some start from a checkpoint or keep their residuals.
    """
    if isinstance(config, SlimConfig):
        found = find_methods(config.method).values()
        removes, trains = config.plan is not None or any(m.reads_removal for m in found), any(m.scratch for m in found)
    elif isinstance(config, AmcConfig):
        listed = [AMC_METHODS[name] for name in config.method]
        removes, trains = any(m.reads_removal for m in listed), any(m.search is None for m in listed)
    else:
        return {}
    why = {} if removes else {"removal": f"method {', '.join(config.method)} removes no residual"}
    if config.checkpoint is not None:
        trained = "the network of --checkpoint is trained already"
        why |= {"sparsity": trained} | ({} if trains else {"train": trained})
    paths = {
        path: reason for table, reason in why.items() if hasattr(config, table) for path in _changed(config, table)
    }
    if isinstance(config, SlimConfig) and config.search_minutes is not None and "auto" not in config.method:
        paths["search_minutes"] = f"method {', '.join(config.method)} does not search"
    return {path: reason for path, reason in paths.items() if path not in _OF_NETWORKS}


def _changed(config: RunConfig, table: str) -> list[str]:
    """Paths of the settings in this table that are not the command's default."""
    now, default = getattr(config, table), next(own.default for own in fields(config) if own.name == table)
    return [f"{table}.{own.name}" for own in fields(now) if getattr(now, own.name) != getattr(default, own.name)]


def warn_unread(config: RunConfig) -> None:
    """Log each reason of `unread`, with its settings."""
    found = unread(config)
    for why in dict.fromkeys(found.values()):
        names = [path for path, own in found.items() if own == why]
        logger.warning("not read, as %s: %s", why, ", ".join(names))
