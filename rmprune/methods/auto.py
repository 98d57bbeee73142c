"""`auto`: a choice for every block and a width for every group, looked for under the budget. Trains nothing.

The presets' own networks and the plans that a surrogate proposes (`rmprune.pruning.proposals`) are cut to the budget, fitted and judged as
whole networks on validation images: first the presets' blocks with widths of the surrogate's, then what it holds best, having learned from
all before it what its losses are worth; then plans that differ in one block from the best, while the minutes given for it last.
"""

import copy
import dataclasses
import functools
import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rmprune.config import SlimConfig
from rmprune.data.batches import affordable
from rmprune.errors import InfeasibleBudget
from rmprune.methods.choose import Verdicts, best, judge, losses, shown
from rmprune.methods.cutter import LEAST_FRACTION, Cutter, layer_times, make_cutter, place_of
from rmprune.methods.refuse import Starts, able
from rmprune.methods.table import METHODS, STARTS, Method
from rmprune.pruning import Budget, find_structure
from rmprune.pruning.allocate import even_fraction
from rmprune.pruning.budget import allowed_units, resolve
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.pruning.groups import Cost, Structure, macs, total_cost
from rmprune.pruning.importance import score_groups
from rmprune.pruning.one_shot import fitting
from rmprune.pruning.options import BlockLayers, block_layers, block_options
from rmprune.pruning.plan import Choice, Options
from rmprune.pruning.program import read_program
from rmprune.pruning.proposals import Proposal, Proposals, Sight, learned, thinned
from rmprune.pruning.surrogate import Ends, block_losses, width_losses
from rmprune.pruning.time_cost import TimeCost
from rmprune.runs.notes import read_notes, remembered, write_text
from rmprune.runs.writing import append_line
from rmprune.training import evaluate
from rmprune.training.job import Files, Job

logger = logging.getLogger("rmprune")
PROPOSED = 8  # plans that the surrogate proposes at first,
APART = 4  # each, but for the presets' blocks, unlike all others in one of so many blocks
END_IMAGES = 256  # training images on which the end of the network is looked at, at most,
END_PIXELS = 2**20  # and of so many pixels, many times over: 64 of 128 x 128
SHAPE_IMAGES = 64  # for networks of which only the shapes are wanted
_FREE = Method("a plan's blocks, the widths by importance")
PRESETS: dict[str, Method] = {name: METHODS[name] for name in METHODS["auto"].candidates} | {
    "uniform": Method(
        "as uniform, its layers fitted anew as all plans' are", widths="uniform", settings={"gradual": False}
    )
}


@dataclass(frozen=True)
class Outlook:
    """The networks that plans are put together from (see `rmprune.pruning.proposals`), and what their layers may cost."""

    networks: Mapping[Choice, nn.Module]
    sights: Mapping[Choice, Sight]
    options: Options
    layers: Mapping[str, BlockLayers]
    limit: float

    @property
    def nothing(self) -> dict[str, dict[Choice, float]]:
        """The choices of every block, as if none lost anything."""
        return {
            name: {choice: 0.0 for choice in ("keep", "remove", "fuse", "merge", "drop") if not own[choice]}
            for name, own in self.options.items()
        }


def refuse(network: nn.Module, budget: Budget, job: Job[SlimConfig]) -> None:
    """Raise what `look` will, before anything is trained; of a budget in time, which is not measured yet, that no layers can be fitted."""
    if budget.latency_ratio is None:
        look(network, budget, job)
    else:
        _networks(network, job)


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
        return carry_out_blocks(network, choices, lambda count: images[:count], removal)[0]

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

    Widths keep the default floor, or less where the budget needs it. Raises InfeasibleBudget where no plan meets the budget, with the
    least that can be had, UnsupportedModel where layers cannot be fitted.
    """
    if budget.name != "memory_ratio":
        budget = dataclasses.replace(budget, memory_ratio=None)  # the cut of each plan holds it
    networks, structures, options = _networks(network, job)
    images = job.data.train.example(2, job.device)
    costs: dict[Choice, Cost] = dict.fromkeys(networks, macs)
    if budget.latency_ratio is not None:
        table, example = layer_times(job, place_of(job)), images[:1].cpu()
        here = {choice: copy.deepcopy(own).cpu() for choice, own in networks.items()}
        costs = {choice: TimeCost(table, own, structures[choice], example) for choice, own in here.items()}
        budget = dataclasses.replace(budget, reference_ms=total_cost(structures["keep"], costs["keep"]))
    limit = resolve(structures["keep"], budget, costs["keep"]).limit
    floor = min(LEAST_FRACTION * even_fraction(structures["keep"], budget, costs["keep"]), budget.max_fraction)
    while True:
        least = budget if job.config.prune.min_fraction is not None else dataclasses.replace(budget, min_fraction=floor)
        sights = {}
        for choice, structure in structures.items():
            widths = {group.name: thinned(allowed_units(group, least)) for group in structure.groups}
            none = {name: [0.0] * len(own) for name, own in widths.items()}
            sights[choice] = Sight(structure, costs[choice], widths, none)
        found = Outlook(networks, sights, options, block_layers(network, images), limit)
        cost = Proposals(sights, found.layers, found.nothing).least_cost()
        if cost <= limit:
            return found
        floor /= 2
        if least is budget or floor < 0.01:
            nearest = getattr(budget, budget.name) * cost / limit
            raise InfeasibleBudget(
                f"{budget.name} {getattr(budget, budget.name):g} cannot be met by any plan of blocks and widths under these limits; the "
                f"least that can be had is about {nearest:.3g}: ask for more, or lower min_channels, min_fraction or round_to"
            )


def ends_of(network: nn.Module, job: Job[SlimConfig]) -> Ends:
    """What the network says of some training images, which is what changes are judged by."""
    count = affordable(END_IMAGES, job.data.input_shape[1:], END_PIXELS)
    return Ends.of(network, job.examples(count), torch.cat([y for _, y in job.pairs])[:count].cpu())


def propose(outlook: Outlook, job: Job[SlimConfig], files: Files) -> Proposals:
    """The surrogate of these networks: what their blocks and widths lose, measured once for these files."""
    network, batches = outlook.networks["keep"], job.batches
    ends = ends_of(network, job)
    note = files.note("losses")

    def of_blocks() -> Any:
        logger.info("%s: what each block loses where it is merged or dropped (KL at the network's end)", files.label)
        return block_losses(network, outlook.options, job.examples, ends, logger.info)

    def of_widths(choice: Choice) -> Any:
        own, sight = outlook.networks[choice], outlook.sights[choice]
        count = len(sight.structure.groups)
        logger.info(
            "%s: what each of %d groups loses where it is narrow, residuals %s", files.label, count, _SAID[choice]
        )
        scores = score_groups("taylor", job.here(own), sight.structure, batches)
        return width_losses(job.here(own), sight.structure, scores, sight.widths, ends)

    blocks = remembered(note, "blocks", of_blocks)
    sights = dict(outlook.sights)
    for choice in _SAID:
        found = remembered(note, choice, functools.partial(of_widths, choice))
        sights[choice] = dataclasses.replace(sights[choice], losses=found)
    return Proposals(sights, outlook.layers, blocks)


_SAID: dict[Choice, str] = {"keep": "kept", "remove": "removed"}


@dataclass(frozen=True)
class Winner:
    """What goes on: its method, the network that this prunes, the widths to descend from.

    begun: the facts of how that network was made; None where it is one of STARTS. verdicts: of everything that was tried;
    plans: those of it that the surrogate proposed, with the reason for each.
    """

    name: str
    method: Method
    network: nn.Module
    widths: Mapping[str, int] | None
    begun: dict[str, Any] | None
    verdicts: Verdicts
    plans: Mapping[str, Mapping[str, Any]]


def choose_plan(network: nn.Module, starts: Starts, budget: Budget, job: Job[SlimConfig], files: Files) -> Winner:
    """The plan of the least loss on validation images, cut to the budget and not fine-tuned, of the presets' and those looked for.

    `network`: the trained original with modules that name its blocks. What was tried stands beside the checkpoint of `files` and is not
    tried again: an interrupted search goes on, a finished one is not repeated, whatever the clock says. Raises InfeasibleBudget where
    no plan meets the budget.
    """
    network = job.here(network)
    outlook = look(network, budget, job)
    surrogate = propose(outlook, job, files)
    unpruned = remembered(
        files.note("losses"), "unpruned", lambda: evaluate(network, job.data.validation, device=job.device).loss
    )
    note = files.note("plans")
    known = read_notes(note)
    plans: dict[str, dict[str, Any]] = known.get("plans", {})
    seconds, whole = float(known.get("seconds", 0.0)), 60 * job.config.search_minutes

    @functools.lru_cache(maxsize=1)
    def carried_out(name: str) -> tuple[nn.Module, dict[str, Any]]:
        return carry_out_blocks(network, plans[name]["blocks"], job.examples, job.config.removal)

    def cutter(name: str) -> Cutter:
        return make_cutter(carried_out(name)[0], _FREE, job, budget, plans[name]["widths"])

    def tried() -> list[Mapping[str, Choice]]:
        return [plan["blocks"] for plan in plans.values()]

    def keep() -> None:
        write_text(note, json.dumps({"plans": plans, "seconds": seconds}))

    def add(found: Proposal, why: str) -> Verdicts:
        """All verdicts, with that on this plan."""
        begun, name = time.monotonic(), f"plan-{len(plans) + 1}"
        plans[name] = {
            "blocks": found.blocks, "widths": found.widths, "predicted": found.loss, "parts": found.parts, "why": why
        }  # fmt: skip
        keep()
        now = dict(verdicts) | dict(judge({name: functools.partial(cutter, name)}, budget, job, files, last=False))
        left = whole - seconds - (time.monotonic() - begun if len(plans) > PROPOSED else 0.0)
        _tell(files, name, plans[name], now[name], max(0.0, left))
        return now

    def taught() -> Proposals:
        """The surrogate, having learned from what plans turned out to lose."""
        found = losses(verdicts)
        pairs = [(plan["parts"], found[n] - unpruned) for n, plan in plans.items() if n in found and "parts" in plan]
        belief = learned([parts for parts, _ in pairs], [loss for _, loss in pairs])
        logger.info("%s: its losses count %s", files.label, ", ".join(f"{k} x {v:.2f}" for k, v in belief.items()))
        return surrogate.believing(belief)

    def first() -> Iterator[tuple[Proposal, str]]:
        for name, preset in PRESETS.items():
            near = _blocks(preset, outlook.options)
            if (found := surrogate.best(outlook.limit, near=near, changes=0, other_than=tried())) is not None:
                yield found, f"the blocks of {name}"
        for apart in (max(1, len(outlook.options) // APART), 1):
            while (found := taught().best(outlook.limit, other_than=tried(), apart=apart)) is not None:
                yield found, f"number {len(plans) + 1} by the surrogate"

    presets = {name: functools.partial(_preset, PRESETS[name], starts, job, budget) for name in able(PRESETS, budget)}
    known_plans = {name: functools.partial(cutter, name) for name in plans}
    verdicts = judge(presets | known_plans, budget, job, files, last=False)
    for found, why in itertools.islice(first(), max(0, PROPOSED - len(plans))):
        verdicts = add(found, why)
    if not losses(verdicts):
        reasons = "; ".join(f"{name}: {verdict['refused']}" for name, verdict in verdicts.items())
        raise InfeasibleBudget(f"no candidate of {files.label} can be had: {reasons}")
    while seconds < whole:
        begun, leader = time.monotonic(), best(verdicts)
        centre = dict(plans[leader]["blocks"]) if leader in plans else _blocks(PRESETS[leader], outlook.options)
        proposed = taught().best(outlook.limit, near=centre, other_than=tried())
        if proposed is None:  # all its neighbours were tried
            seconds = whole
        else:
            changed = [f"{b} {centre[b]} -> {c}" for b, c in proposed.blocks.items() if c != centre[b]]
            verdicts = add(proposed, f"{leader} with {', '.join(changed) or 'other widths'}")
            seconds += time.monotonic() - begun
        keep()
    name = best(verdicts)
    if name in plans:
        plain, facts = carried_out(name)
        return Winner(name, _FREE, plain, plans[name]["widths"], facts, verdicts, plans)
    return Winner(name, PRESETS[name], starts(PRESETS[name].start), None, None, verdicts, plans)


def _preset(method: Method, starts: Starts, job: Job[SlimConfig], budget: Budget) -> Cutter:
    return make_cutter(starts(method.start), method, job, budget)


def _blocks(preset: Method, options: Options) -> dict[str, Choice]:
    """What a preset makes of the blocks."""
    prefer = STARTS[preset.start].prefer
    return {block: next(choice for choice in prefer if not own[choice]) for block, own in options.items()}


def _tell(files: Files, name: str, plan: Mapping[str, Any], verdict: Mapping[str, Any], left: float) -> None:
    logger.info("%s: %s, %s: %s; %.0f s of search left", files.label, name, plan["why"], shown(verdict), left)
    line = {
        "search": files.label,
        "plan": name,
        **{key: plan[key] for key in ("why", "predicted", "blocks")},
        **verdict,
    }
    append_line(files.log, json.dumps(line | {"seconds_left": round(left, 1)}))
