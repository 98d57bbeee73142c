"""The ways to slim a trained network that a run can compare: which network is pruned, and by which rule. Prunes nothing."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from rmprune.errors import ConfigError


class Method(NamedTuple):
    """`start`: which network it prunes (`rmprune.methods.start`). `settings`: what it fixes of PruneConfig.

    `which`: all channels, those inside blocks, or the same fraction of every layer. `mixed`: once the network is pruned, residuals are
    removed wherever that makes it faster, measured. `candidates`: methods of which the one goes on whose network, cut to the budget,
    has the least loss on validation images before any fine-tuning (`rmprune.methods.choose`).
    """

    about: str
    start: str
    settings: Mapping[str, Any] = MappingProxyType({})
    torch_pruning: bool = False
    which: Literal["free", "inner", "uniform"] = "free"
    mixed: bool = False
    candidates: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "rm": Method(
        "RM, then any channel of the plain network by the settings given (by default one cut, its layers fitted anew)",
        "plain",
    ),
    "rm-collapse": Method(
        "each block's branch fitted by one convolution, which RM merges with the shortcut without reserving a channel: "
        "a plain chain of half the depth; then as rm",
        "collapsed",
    ),
    "mixed-collapse": Method(
        "the same for that half of the blocks that one convolution fits best; the others keep their residuals",
        "half-collapsed",
    ),
    "coupled-collapse": Method(
        "the same blocks of one convolution with their residuals kept: the share of rm-collapse that RM is responsible for",
        "collapsed-residual",
    ),
    "coupled-half-collapse": Method(
        "the same half of the blocks with all residuals kept: the share of mixed-collapse that RM is responsible for",
        "half-collapsed-residual",
    ),
    "mixed-auto": Method(
        "residual, mixed-collapse, rm-collapse or rm: each is cut to the budget, and the one with the least loss on validation images "
        "before fine-tuning goes on",
        "dense",
        candidates=("residual", "mixed-collapse", "rm-collapse", "rm"),
    ),
    "rm-slimming": Method(
        "the paper's path: RM, one cut by batch-norm scale under one global threshold",
        "plain",
        {"gradual": False, "reconstruct": False, "importance": "batch_norm", "rank": "importance"},
    ),
    "mixed": Method(
        "as residual, then RM, exactly, for those residuals whose removal makes the pruned network faster",
        "dense",
        mixed=True,
    ),
    "coupled": Method(
        "residuals kept, one cut by Torch-Pruning's group-aware batch-norm scale",
        "dense",
        {"gradual": False, "importance": "batch_norm"},
        torch_pruning=True,
    ),
    "coupled-taylor": Method(
        "residuals kept, one cut by Torch-Pruning's group-aware Taylor importance",
        "dense",
        {"gradual": False, "importance": "taylor"},
        torch_pruning=True,
    ),
    "coupled-norm": Method(
        "residuals kept, one cut by Torch-Pruning's group norm (L2 of all weights of a group)",
        "dense",
        {"gradual": False, "importance": "magnitude"},
        torch_pruning=True,
    ),
    "residual": Method(
        "residuals kept, otherwise exactly as rm: the share of the result that RM is responsible for", "dense"
    ),
    "inner": Method("residuals kept and streams untouched (as in ThiNet), otherwise as rm", "dense", which="inner"),
    "uniform": Method(
        "residuals kept, the same fraction of every layer, its best channels by the importance given, one cut",
        "dense",
        {"gradual": False, "reconstruct": False},
        which="uniform",
    ),
}


def find_methods(names: tuple[str, ...]) -> dict[str, Method]:
    """The methods of these names; ConfigError for one that does not exist."""
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}


def alternatives(method: Method) -> dict[str, Method]:
    """What may be done in this method's name: its candidates by name; none for a method that is itself what is done."""
    return {name: METHODS[name] for name in method.candidates}
