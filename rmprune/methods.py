"""The ways to slim a trained network that a run can compare: which network is pruned, by which rule. Files and order are the pipelines'."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmprune.config import PruneConfig, SlimConfig, TrainConfig
from rmprune.data import Dataset
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.pruning import Budget, GradualPruner, find_structure, prune, prune_coupled
from rmprune.pruning.baselines import inner_only
from rmprune.pruning.budget import even_fraction
from rmprune.pruning.importance import score_groups
from rmprune.pruning.structure import Structure
from rmprune.rundir import write_text
from rmprune.timed import Place, find_macs_ratio, in_macs
from rmprune.training import fit

logger = logging.getLogger("rmprune")
FLOOR = 0.5  # every layer keeps at least this part of what an even cut would leave it
TIME_ATTEMPTS = 5  # further cuts where the trained network misses its budget in measured time
IMPORTANCE_IMAGES = 2048  # training images that a one-cut importance is measured on


class Method(NamedTuple):
    """`plain`: prunes what RM makes of the network, else the network with its residuals. `settings`: what it fixes of PruneConfig."""

    about: str
    plain: bool
    settings: dict[str, Any]
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
    """Prune `network` to the budget and fine-tune it; all methods get the same number of epochs. On the CPU, in eval mode.

    Only a network that misses a budget in measured time is cut again, with one epoch after each cut.
    """
    settings = dataclasses.replace(config.prune, **method.settings)
    example = data.train.example(1)
    hook, asked, measured = None, budget, checkpoint.with_name(f"{label}-measured.json")
    if asked.latency_ratio is not None:
        place = Place.first(config.measure, teacher, example)
        structure = selected(network, example, method)
        scores = score_groups(settings.importance, network, structure, importance_batches(data))
        floor = FLOOR if settings.min_fraction is None else None
        find = functools.partial(find_macs_ratio, network, structure, scores, budget, place, floor)
        budget = in_macs(structure, budget, remembered(measured, 0, find), floor)
    else:
        budget = with_floor(budget, network, example, settings)
    if settings.gradual and config.finetune.epochs > 0:
        steps = data.train.num_batches(data.config.batch_size, shuffled=True) * config.finetune.epochs
        hook = gradual_pruner(network, example, budget, settings, method, steps=steps, epochs=config.finetune.epochs)
    else:  # after an interruption the same cut again gives the network that the checkpoint belongs to
        network = cut_once(network, example, budget, settings, data, torch_pruning=method.torch_pruning)

    def tune(network: nn.Module, train: TrainConfig, hook: GradualPruner | None, stage: str) -> nn.Module:
        return fit(
            network,
            data,
            train,
            seed=seed,
            device=device,
            hook=hook,
            teacher=teacher if train.distillation else None,
            checkpoint=checkpoint.with_name(f"{stage}.pt"),
            log=log,
            label=stage,
        ).cpu()

    network = tune(network, config.finetune, hook, label)
    if asked.latency_ratio is None:
        return network
    once = dataclasses.replace(config.finetune, epochs=1, warmup_epochs=0.0)
    for attempt in range(1, TIME_ATTEMPTS + 2):  # the promise is about the network as a whole, as it was trained
        take_time = functools.partial(lambda network: place.ratios({label: network})[label], network)
        ratio = remembered(measured, attempt, take_time) if attempt <= TIME_ATTEMPTS else take_time()
        if ratio <= asked.latency_ratio:
            logger.info("%s takes %.3f of the original's time on %s", label, ratio, place)
            return network
        if attempt > TIME_ATTEMPTS:
            break
        assert budget.macs_ratio is not None
        budget = dataclasses.replace(budget, macs_ratio=budget.macs_ratio * 0.97 * asked.latency_ratio / ratio)
        logger.info("%s takes %.3f of the original's time, more than allowed: cut again", label, ratio)
        network = cut_once(network, example, budget, settings, data, torch_pruning=method.torch_pruning)
        network = tune(network, once, None, f"{label}-again-{attempt}")
    raise InfeasibleBudget(
        f"latency_ratio={asked.latency_ratio:g} was not met on {place} after {TIME_ATTEMPTS} further cuts; "
        "the machine may be busy with something else: run the same command again, or ask for a larger latency_ratio"
    )


def remembered(file: Path, number: int, find: Callable[[], float]) -> float:
    """Figure `number` of a JSON list of measured ones; found and written where it is not there yet.

    Measured again after an interruption they would differ, and with them the networks that checkpoints belong to.
    """
    known = json.loads(file.read_text()) if file.is_file() else []
    if number >= len(known):
        known.append(find())
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(known))
    return float(known[number])


def selected(network: nn.Module, example: Tensor, method: Method) -> Structure:
    """What the method may prune in this network."""
    structure = find_structure(network, example)
    return inner_only(structure) if method.inner else structure


def importance_batches(data: Dataset) -> list[tuple[Tensor, Tensor]]:
    """The training images that a one-cut importance is measured on."""
    return list(data.train.batches(128, limit=IMPORTANCE_IMAGES))


def with_floor(budget: Budget, network: nn.Module, example: Tensor, settings: PruneConfig) -> Budget:
    """The budget with the default of min_fraction, where the settings leave it open.

    Without a floor, importance per MAC empties early layers, and what they lost cannot be trained back.
    """
    if settings.min_fraction is not None:
        return budget
    even = even_fraction(find_structure(network, example), budget)
    return dataclasses.replace(budget, min_fraction=min(FLOOR * even, budget.max_fraction))


def gradual_pruner(
    network: nn.Module,
    example: Tensor,
    budget: Budget,
    settings: PruneConfig,
    method: Method,
    *,
    steps: int,
    epochs: int,
) -> GradualPruner:
    """The hook that cuts while training; `steps` and `epochs` of fine-tuning in all."""
    return GradualPruner(
        network,
        example,
        budget,
        every=max(1, round(settings.cut_fraction * steps / settings.cuts)),
        prune_epochs=settings.cut_fraction * epochs,
        decay=settings.score_decay,
        rank=settings.rank,
        structure=selected(network, example, method),
    )


def cut_once(
    network: nn.Module, example: Tensor, budget: Budget, settings: PruneConfig, data: Dataset, *, torch_pruning: bool
) -> nn.Module:
    """One cut before fine-tuning, by importance measured on training images."""
    batches = importance_batches(data)
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
            if budget.latency_ratio is not None:
                continue  # what a network takes is measured once it is trained
            floored = with_floor(budget, network, example, config.prune)
            gradual_pruner(network, example, floored, config.prune, method, steps=1, epochs=1)
