"""`depth`: whole blocks go and every width stays. What pruning of channels has to beat at equal cost. Trains nothing itself."""

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from rmprune.config import SlimConfig
from rmprune.errors import UnsupportedModel
from rmprune.measure.widest import Widest, widest
from rmprune.methods.costs import cost_ratios
from rmprune.methods.outlook import SHAPE_IMAGES, ends_of
from rmprune.methods.refuse import refuse_too_dear
from rmprune.pruning import Budget
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.pruning.options import block_options
from rmprune.pruning.plan import Choice, Options, SlimPlan, layers_digest
from rmprune.pruning.surrogate import block_losses
from rmprune.runs.notes import remembered
from rmprune.training.job import Files, Job

SHORTEST = "depth: without any block that can be dropped the network"


def shorten(network: nn.Module, budget: Budget, job: Job[SlimConfig], files: Files) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network without the blocks that lose least when dropped alone, as few as the budget asks for, and its facts.

    `network` has modules that name its blocks. Shortcuts that stand for a block are fitted. Raises InfeasibleBudget and UnsupportedModel
    as `check_depth` does.
    """
    network = job.here(network)
    options = _droppable(network, job)

    def measure() -> dict[str, float]:
        found = block_losses(network, options, job.examples, ends_of(network, job))
        return {name: own["drop"] for name, own in found.items()}

    note = files.note("losses")
    losses: dict[str, float] = remembered(files.shared_note("blocks"), "blocks", measure)
    order = sorted(losses, key=lambda name: losses[name])
    left, make = [float(1 + n) for n in range(len(order))], _without(network, order, job)
    ratios = functools.partial(cost_ratios, budget, job)

    def find() -> dict[str, float]:
        return asdict(widest(SHORTEST, make, left, ratios, budget.value, timed=budget.latency_ratio is not None))

    found = Widest(**remembered(note, "left", find))
    count = len(order) + 1 - round(found.width)
    choices: dict[str, Choice] = dict.fromkeys(order[:count], "drop")
    shorter, facts = carry_out_blocks(network, choices, job.examples, job.config.removal)
    plan = SlimPlan(facts["blocks"], {}, facts["fuse"], layers_digest(job.original))
    search = {"losses": losses, "dropped": order[:count], "verified_ratio": found.ratio}
    return shorter.cpu(), {
        "method": files.label,
        "collapsed": facts["collapsed"],
        "search": search,
        "plan": plan.to_dict(),
    }


def check_depth(network: nn.Module, budget: Budget, job: Job[SlimConfig]) -> None:
    """Raise UnsupportedModel where no block can be dropped, InfeasibleBudget where dropping them all does not meet the budget."""
    network = job.here(network)
    order = list(_droppable(network, job))
    refuse_too_dear(SHORTEST, _without(network, order, job)(1.0), budget, job)


def _droppable(network: nn.Module, job: Job[SlimConfig]) -> Options:
    """The blocks that can be dropped, with that as their one choice."""
    options = block_options(network, job.data.train.example(2, job.device), removal=job.config.removal)
    found = {
        name: dict.fromkeys(own, "not looked at") | {"drop": ""} for name, own in options.items() if not own["drop"]
    }
    if not found:
        reasons = "; ".join(f"{name}: {own['drop']}" for name, own in options.items())
        raise UnsupportedModel(f"depth: no block can be dropped: {reasons or 'the network has no residual'}")
    return found


def _without(network: nn.Module, order: list[str], job: Job[SlimConfig]) -> Callable[[float], nn.Module]:
    """make(left): the network with so many of the blocks of `order`, the last ones, less one; its weights are not fitted."""
    images = job.data.train.example(SHAPE_IMAGES, job.device)

    def make(left: float) -> nn.Module:
        gone: dict[str, Choice] = dict.fromkeys(order[: len(order) + 1 - round(left)], "drop")
        return carry_out_blocks(network, gone, lambda n: images[:n], job.config.removal)[0].cpu()

    return make
