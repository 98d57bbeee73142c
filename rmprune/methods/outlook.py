"""What plans of a network are put together from: its forms, what their layers cost at any width, and what each change loses."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from rmprune.config import SlimConfig
from rmprune.config.pruning import PlannedChoice
from rmprune.data.batches import affordable
from rmprune.errors import ConfigError, InfeasibleBudget, rounded
from rmprune.graph.copied import copied
from rmprune.methods.costs import layer_times, place_of
from rmprune.methods.cutter import LEAST_FRACTION, job_scores
from rmprune.pruning import Budget, find_structure
from rmprune.pruning.allocate import even_fraction
from rmprune.pruning.budget import allowed_units, resolve
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.pruning.groups import Structure, total_cost
from rmprune.pruning.layers import Cost, macs
from rmprune.pruning.options import BlockLayers, block_layers, block_options
from rmprune.pruning.plan import CHOICES, Choice, Options
from rmprune.pruning.program import read_program
from rmprune.pruning.proposals import Proposals, Sight, thinned
from rmprune.pruning.refit import fitting
from rmprune.pruning.surrogate import Ends, block_losses, width_losses
from rmprune.pruning.time_cost import TimeCost
from rmprune.runs.notes import remembered
from rmprune.training.job import Files, Job

logger = logging.getLogger("rmprune")
END_IMAGES = 256  # training images on which the end of the network is looked at, at most,
END_PIXELS = 2**20  # and of so many pixels, many times over: 64 of 128 x 128
SHAPE_IMAGES = 8  # for networks of which only the shapes are wanted


@dataclass(frozen=True)
class Outlook:
    """The networks that plans are put together from (see `rmprune.pruning.proposals`), and what their layers may cost.

    options: what each block can become; allowed: of that, what the settings let plans make of it.
    """

    networks: Mapping[Choice, nn.Module]
    sights: Mapping[Choice, Sight]
    options: Options
    allowed: Options
    layers: Mapping[str, BlockLayers]
    limit: float

    @property
    def nothing(self) -> dict[str, dict[Choice, float]]:
        """The choices of every block, as if none lost anything."""
        return {
            name: {choice: 0.0 for choice in get_args(PlannedChoice) if not own[choice]}
            for name, own in self.allowed.items()
        }


def refuse(network: nn.Module, budget: Budget, job: Job[SlimConfig]) -> None:
    """Raise what `look` will, before anything is trained; of a budget in time, which is not measured yet, that no layers can be fitted."""
    if budget.latency_ratio is None:
        look(network, budget, job)
    else:
        _allowed(_networks(network, job)[2], job.config.choices)


def _allowed(options: Options, choices: Sequence[str]) -> Options:
    """The options of blocks, those that are not among `choices` (none: any) refused. Raises ConfigError for a block without any."""
    if not choices:
        return options
    found: dict[str, dict[Choice, str]] = {}
    for name, own in options.items():
        found[name] = {c: why if c in choices else "not among the choices allowed" for c, why in own.items()}
        if all(found[name].values()):
            reasons = "; ".join(f"{choice}: {own[choice]}" for choice in CHOICES if choice in choices)
            raise ConfigError(f"block {name} can be none of the choices {', '.join(choices)} ({reasons}); allow keep")
    return found


def _networks(
    network: nn.Module, job: Job[SlimConfig]
) -> tuple[dict[Choice, nn.Module], dict[Choice, Structure], Options]:
    """The networks that plans are put together from, and what its blocks may become.

    Raises UnsupportedModel where layers cannot be fitted, by which every width is weighed.
    """
    images = job.data.train.example(SHAPE_IMAGES, job.device)
    removal = dataclasses.replace(job.config.removal, fuse="never")
    options = block_options(network, images[:2], removal=removal)

    def shaped(*prefer: Choice) -> nn.Module:
        choices = {name: next(choice for choice in prefer if not own[choice]) for name, own in options.items()}
        return carry_out_blocks(network, choices, lambda count: images[:count], removal, options)[0]

    networks: dict[Choice, nn.Module] = {
        "keep": network,
        "remove": shaped("remove", "keep"),
        "merge": shaped("merge", "remove", "keep"),
    }
    if not all(own["fuse"] for own in options.values()):
        networks["fuse"] = shaped("fuse", "remove", "keep")
    structures = {choice: find_structure(own, images[:2]) for choice, own in networks.items()}
    for choice in _SAID:
        with fitting("auto weighs widths by fits: use another method, such as residual with --no-reconstruct"):
            read_program(networks[choice], structures[choice], images[:2])
    return networks, structures, options


def look(network: nn.Module, budget: Budget, job: Job[SlimConfig]) -> Outlook:
    """The networks that plans of `network` (with modules that name its blocks) are put together from, whatever its weights.

    Widths keep the default floor, or less where the budget needs it for a plan, and for one in which all blocks are kept, removed or
    fused. Raises InfeasibleBudget where no plan meets the budget, with the
    least that can be had, UnsupportedModel where layers cannot be fitted.
    """
    if budget.name != "memory_ratio":
        budget = dataclasses.replace(budget, memory_ratio=None)  # the cut of each plan holds it
    networks, structures, options = _networks(network, job)
    allowed = _allowed(options, job.config.choices)
    images = job.data.train.example(2, job.device)
    costs: dict[Choice, Cost] = dict.fromkeys(networks, macs)
    if budget.latency_ratio is not None:
        table, example = layer_times(job, place_of(job)), images[:1].cpu()
        here = {choice: copied(own).cpu() for choice, own in networks.items()}
        costs = {choice: TimeCost(table, own, structures[choice], example) for choice, own in here.items()}
        budget = dataclasses.replace(budget, reference_ms=total_cost(structures["keep"], costs["keep"]))
    limit = resolve(structures["keep"], budget, costs["keep"]).limit
    floor = min(LEAST_FRACTION * even_fraction(structures["keep"], budget, costs["keep"]), budget.max_fraction)
    found: Outlook | None = None
    most = 0
    while True:
        least = budget if job.config.prune.min_fraction is not None else dataclasses.replace(budget, min_fraction=floor)
        sights = {}
        for choice, structure in structures.items():
            widths = {group.name: thinned(allowed_units(group, least)) for group in structure.groups}
            none = {name: [0.0] * len(own) for name, own in widths.items()}
            sights[choice] = Sight(structure, costs[choice], widths, none)
        now = Outlook(networks, sights, options, allowed, block_layers(network, images), limit)
        plans = Proposals(sights, now.layers, now.nothing)
        forms = [_form(now, prefer) for prefer in (("keep",), ("remove",), ("fuse", "remove"))]
        met = [plans.best(limit, near=form, changes=0) is not None for form in forms]
        can = sum(met) + (any(met) or plans.best(limit) is not None)
        if can > most:
            found, most = now, can
        floor /= 2
        if most > len(forms) or least is budget or floor < 0.01:
            break
    if found is not None:
        return found
    nearest = rounded(budget.value * plans.least_cost() / limit, 3)
    raise InfeasibleBudget(
        f"{budget.name} {budget.value:g} cannot be met by any plan of blocks and widths under these limits; the "
        f"least that can be had is about {nearest:.3g}: ask for more, or lower min_channels, min_fraction or round_to"
    )


def _form(outlook: Outlook, prefer: Sequence[Choice]) -> dict[str, Choice]:
    """All blocks alike, where they can be."""
    return {name: next((c for c in prefer if c in own), next(iter(own))) for name, own in outlook.nothing.items()}


def ends_of(network: nn.Module, job: Job[SlimConfig]) -> Ends:
    """What the network says of some training images, which is what changes are judged by."""
    count = affordable(END_IMAGES, job.data.input_shape[1:], END_PIXELS)
    return Ends.of(network, job.examples(count), torch.cat([y for _, y in job.pairs])[:count].cpu())


def propose(outlook: Outlook, job: Job[SlimConfig], files: Files) -> Proposals:
    """The surrogate of these networks: what their blocks and widths lose, measured once for these files."""
    network = outlook.networks["keep"]
    ends = ends_of(network, job)
    note = files.note("losses")

    def of_blocks() -> Any:
        logger.info("%s: what each block loses where it is merged or dropped (KL at the network's end)", files.label)
        return block_losses(network, outlook.allowed, job.examples, ends, logger.info)

    def of_widths(choice: Choice) -> Any:
        own, sight = outlook.networks[choice], outlook.sights[choice]
        count = len(sight.structure.groups)
        logger.info(
            "%s: what each of %d groups loses where it is narrow, residuals %s", files.label, count, _SAID[choice]
        )
        scores = job_scores(job, job.here(own), sight.structure, "taylor")
        return width_losses(job.here(own), sight.structure, scores, sight.widths, ends)

    blocks = remembered(files.shared_note("blocks"), "blocks", of_blocks)
    sights = dict(outlook.sights)
    for choice in _SAID:
        asked = hashlib.sha256(json.dumps(sights[choice].widths, sort_keys=True).encode()).hexdigest()[:16]
        found = remembered(note, f"{choice} {asked}", functools.partial(of_widths, choice))  # losses go by place
        sights[choice] = dataclasses.replace(sights[choice], losses=found)
    return Proposals(sights, outlook.layers, blocks)


_SAID: dict[Choice, str] = {"keep": "kept", "remove": "removed"}
