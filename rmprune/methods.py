"""The ways to slim a trained network that a run can compare: which network is pruned, by which rule. Files and order are the pipelines'."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rmprune.config import PruneConfig, SlimConfig
from rmprune.data import Dataset
from rmprune.errors import ConfigError
from rmprune.pruning import Budget, GradualPruner, find_structure, prune, prune_coupled
from rmprune.pruning.baselines import inner_only
from rmprune.pruning.budget import even_fraction
from rmprune.training import fit

FLOOR = 0.5  # every layer keeps at least this part of what an even cut would leave it
IMPORTANCE_IMAGES = 2048  # training images that a one-cut importance is measured on


class Method(NamedTuple):
    """`plain`: prunes what RM makes of the network, else the network with its residuals. `settings`: what it fixes of PruneConfig."""

    about: str
    plain: bool
    settings: dict[str, object]
    torch_pruning: bool = False
    inner: bool = False


METHODS: dict[str, Method] = {
    "rm": Method(
        "RM, then any channel of the plain network by the settings given (by default cut while training)", True, {}
    ),
    "rm-slimming": Method(
        "the paper's path: RM, one cut by batch-norm scale under one global threshold",
        True,
        {"gradual": False, "importance": "batch_norm", "rank": "importance"},
    ),
    "coupled": Method(
        "residuals kept, one cut by Torch-Pruning's group-aware batch-norm scale",
        False,
        {"gradual": False, "importance": "batch_norm"},
        torch_pruning=True,
    ),
    "coupled-taylor": Method(
        "residuals kept, one cut by Torch-Pruning's group-aware Taylor importance",
        False,
        {"gradual": False, "importance": "taylor"},
        torch_pruning=True,
    ),
    "coupled-gradual": Method(
        "residuals kept, otherwise exactly as rm: the share of the result that RM is responsible for", False, {}
    ),
    "inner": Method("residuals kept and streams untouched (as in ThiNet), otherwise as rm", False, {}, inner=True),
}


def find_methods(names: tuple[str, ...]) -> dict[str, Method]:
    """The methods of these names; ConfigError for one that does not exist."""
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}


def slim_network(
    network: nn.Module,
    method: Method,
    budget: Budget,
    config: SlimConfig,
    data: Dataset,
    *,
    seed: int,
    device: torch.device,
    teacher: nn.Module,
    checkpoint: Path,
    log: Path,
    label: str,
) -> nn.Module:
    """Prune `network` to the budget and fine-tune it; all methods get the same number of epochs. On the CPU, in eval mode."""
    settings = dataclasses.replace(config.prune, **method.settings)  # type: ignore[arg-type]
    example = data.train.example(1)
    budget = with_floor(budget, network, example, settings)
    hook = None
    if settings.gradual:
        steps = data.train.num_batches(data.config.batch_size, shuffled=True) * config.finetune.epochs
        hook = gradual_pruner(
            network, example, budget, settings, steps=steps, epochs=config.finetune.epochs, inner=method.inner
        )
    else:  # after an interruption the same cut again gives the network that the checkpoint belongs to
        network = cut_once(network, example, budget, settings, data, torch_pruning=method.torch_pruning)
    return fit(
        network,
        data,
        config.finetune,
        seed=seed,
        device=device,
        hook=hook,
        teacher=teacher if config.finetune.distillation else None,
        checkpoint=checkpoint,
        log=log,
        label=label,
    ).cpu()


def with_floor(budget: Budget, network: nn.Module, example: Tensor, settings: PruneConfig) -> Budget:
    """The budget with the default of min_fraction, where the settings leave it open.

    Without a floor, importance per MAC empties early layers, and what they lost cannot be trained back.
    """
    if settings.min_fraction is not None:
        return budget
    even = even_fraction(find_structure(network, example), budget)
    return dataclasses.replace(budget, min_fraction=min(FLOOR * even, budget.max_fraction))


def gradual_pruner(
    network: nn.Module, example: Tensor, budget: Budget, settings: PruneConfig, *, steps: int, epochs: int, inner: bool
) -> GradualPruner:
    """The hook that cuts while training; `steps` and `epochs` of fine-tuning in all."""
    structure = find_structure(network, example)
    return GradualPruner(
        network,
        example,
        budget,
        every=max(1, round(settings.cut_fraction * steps / settings.cuts)),
        prune_epochs=settings.cut_fraction * epochs,
        decay=settings.score_decay,
        rank=settings.rank,
        structure=inner_only(structure) if inner else structure,
    )


def cut_once(
    network: nn.Module, example: Tensor, budget: Budget, settings: PruneConfig, data: Dataset, *, torch_pruning: bool
) -> nn.Module:
    """One cut before fine-tuning, by importance measured on training images."""
    batches = list(data.train.batches(128, limit=IMPORTANCE_IMAGES))
    if torch_pruning:
        return prune_coupled(network, example, importance=settings.importance, budget=budget, data=batches)
    return prune(network, example, importance=settings.importance, budget=budget, data=batches, rank=settings.rank)


def check_budgets(
    networks: Callable[[bool], nn.Module],
    methods: dict[str, Method],
    budgets: list[Budget],
    config: SlimConfig,
    example: Tensor,
) -> None:
    """Raise InfeasibleBudget before any training where limits forbid a budget. `networks(plain)` gives one with random weights."""
    for method in methods.values():
        network = networks(method.plain)
        for budget in budgets:
            budget = with_floor(budget, network, example, config.prune)
            gradual_pruner(network, example, budget, config.prune, steps=1, epochs=1, inner=method.inner)
