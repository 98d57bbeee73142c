"""`auto`: a choice for every block and a width for every group, looked for under the budget. Trains nothing.

The presets' own networks and the plans that a surrogate proposes (`rmprune.pruning.proposals`) are cut to the budget, fitted and judged as
whole networks on validation images: first the presets' blocks with widths of the surrogate's, then what it holds best, having learned from
all before it what its losses are worth; then plans that differ in one block from the best, while they help and the time lasts. How many
goes by the number of validation images.
"""

import functools
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from torch import nn

from rmprune.config import SlimConfig
from rmprune.methods.choose import Verdicts, best, judge, losses, shown
from rmprune.methods.cutter import ROUGH, Cutter, make_cutter
from rmprune.methods.outlook import look, propose
from rmprune.methods.refuse import Refusal, Starts, refusal
from rmprune.methods.table import METHODS, STARTS, Method
from rmprune.pruning import Budget
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.pruning.plan import Choice, Options
from rmprune.pruning.proposals import Proposal, Proposals, learned
from rmprune.runs.notes import read_notes, remembered
from rmprune.runs.progress import duration
from rmprune.runs.writing import append_line, write_text
from rmprune.training import evaluate
from rmprune.training.job import Files, Job

logger = logging.getLogger("rmprune")
PROPOSED = 8  # plans that the surrogate proposes at first, at most
TOLD_APART = 100  # and one for so many validation images: fewer do not tell more plans apart;
APART = 4  # each, but for the presets' blocks, unlike all others in one of so many blocks
MINUTES = 1.0  # for plans that differ in one block from the best, where no time is given for them, and
WORSE = 4  # no longer than until so many in a row are no better, or as many as were proposed, if those are fewer
AROUND = (1.0, 0.93)  # of what plans before were cut to, of what their widths cost: where that of a plan is looked for
FREE = Method("a plan's blocks, the widths by importance")
PRESETS: dict[str, Method] = {name: METHODS[name] for name in METHODS["auto"].candidates}


@dataclass(frozen=True)
class Winner:
    """What goes on: its method, the network that this prunes, the widths to descend from.

    begun: the facts of how that network was made; None where it is one of STARTS. verdicts: of everything that was tried;
    plans: those of it that the surrogate proposed, with the reason for each; seconds: what the search took, interrupted or not.
    """

    name: str
    method: Method
    network: nn.Module
    widths: Mapping[str, int] | None
    begun: dict[str, Any] | None
    verdicts: Verdicts
    plans: Mapping[str, Mapping[str, Any]]
    seconds: float


def choose_plan(network: nn.Module, starts: Starts, budget: Budget, job: Job[SlimConfig], files: Files) -> Winner:
    """The plan of the least loss on validation images, cut to the budget and not fine-tuned, of the presets' and those looked for.

    `network`: the trained original with modules that name its blocks. What was tried stands beside the checkpoint of `files` and is not
    tried again: an interrupted search goes on, a finished one is not repeated, whatever the clock says. Raises InfeasibleBudget where
    no plan meets the budget.
    """
    started = time.monotonic()
    network = job.here(network)
    outlook = look(network, budget, job)
    note = files.note("plans")
    known = read_notes(note)
    plans: dict[str, dict[str, Any]] = known.get("plans", {})
    took, judged_before = float(known.get("took", 0.0)), len(read_notes(files.note("candidates")))
    seconds, minutes = float(known.get("seconds", 0.0)), job.config.search_minutes
    whole = 60 * (MINUTES if minutes is None else minutes)
    wanted = PROPOSED if minutes is not None else min(PROPOSED, len(job.data.validation) // TOLD_APART)
    lasted: list[float] = []  # seconds that each plan took

    @functools.cache
    def surrogate() -> Proposals:
        return propose(outlook, job, files)

    @functools.cache
    def unpruned() -> float:
        weights = job.data.class_weights
        found = functools.partial(evaluate, network, job.data.validation, device=job.device, weights=weights)
        return remembered(files.note("losses"), "unpruned", lambda: found().loss)

    @functools.lru_cache(maxsize=1)
    def carried_out(name: str) -> tuple[nn.Module, dict[str, Any]]:
        return carry_out_blocks(network, plans[name]["blocks"], job.examples, job.config.removal)

    def cutter(name: str) -> Cutter:
        """Plans of one network miss the time that its table of layers promises by much the same."""
        found = _rough(make_cutter(carried_out(name)[0], FREE, job, budget, plans[name]["widths"]))
        before = [verdict["of_widths"] for verdict in verdicts.values() if "of_widths" in verdict]
        return replace(found, below=[median(before) * share for share in AROUND]) if before else found

    def changes() -> list[str]:
        """The plans that differ in one block from what was best before them; notes of before do not say which these are."""
        return [name for n, (name, plan) in enumerate(plans.items()) if plan.get("near", n >= wanted)]

    def proposed() -> int:
        """How many others there are."""
        return len(plans) - len(changes())

    def tried() -> list[Mapping[str, Choice]]:
        return [plan["blocks"] for plan in plans.values()]

    def keep() -> float:
        """Writes down how far the search is; returns the seconds that it took."""
        whole_time = took + time.monotonic() - started
        write_text(note, json.dumps({"plans": plans, "seconds": seconds, "took": whole_time}))
        return whole_time

    def judged(name: str) -> Verdicts:
        """All verdicts, with that on this plan."""
        begun = time.monotonic()
        one = {name: functools.partial(cutter, name)}
        now = dict(verdicts) | dict(judge(one, budget, job, files, refusals=refusals))
        lasted.append(time.monotonic() - begun)
        to_come = max(0, wanted - proposed()) * sum(lasted) / len(lasted)
        for_changes = whole - seconds - (lasted[-1] if changes() else 0.0)
        _tell(files, name, plans[name], now[name], to_come + max(0.0, for_changes))
        return now

    def add(found: Proposal, why: str, near: str | None = None) -> Verdicts:
        name = f"plan-{len(plans) + 1}"
        plans[name] = {
            "blocks": found.blocks, "widths": found.widths, "predicted": found.loss, "parts": found.parts, "why": why,
            "near": near,
        }  # fmt: skip
        keep()
        return judged(name)

    def taught() -> Proposals:
        """The surrogate, having learned from what plans turned out to lose."""
        found = losses(verdicts)
        pairs = [(plan["parts"], found[n] - unpruned()) for n, plan in plans.items() if n in found and "parts" in plan]
        belief = learned([parts for parts, _ in pairs], [loss for _, loss in pairs])
        logger.info("%s: its losses count %s", files.label, ", ".join(f"{k} x {v:.2f}" for k, v in belief.items()))
        return surrogate().believing(belief)

    def first() -> Iterator[tuple[Proposal, str]]:
        for name, preset in allowed.items():
            near = _blocks(preset, outlook.options)
            if (found := surrogate().best(outlook.limit, near=near, changes=0, other_than=tried())) is not None:
                yield found, f"the blocks of {name}"
        for apart in (max(1, len(outlook.options) // APART), 1):
            while (found := taught().best(outlook.limit, other_than=tried(), apart=apart)) is not None:
                yield found, f"number {len(plans) + 1} by the surrogate"

    allowed = {
        name: preset
        for name, preset in PRESETS.items()
        if not any(outlook.allowed[block][choice] for block, choice in _blocks(preset, outlook.options).items())
    }
    presets = {name: functools.partial(_cutter, preset, starts, job, budget) for name, preset in allowed.items()}
    refusals: dict[str, Refusal] = {}
    verdicts = judge(presets, budget, job, files, refusals=refusals)
    if not losses({name: verdicts[name] for name in presets}):  # plans may have been judged before an interruption
        wanted = PROPOSED
    for name in [name for name in plans if name not in verdicts]:  # an interrupted search left it
        verdicts = judged(name)
    for found, why in itertools.islice(first(), max(0, wanted - proposed())):
        verdicts = add(found, why)
    if not losses(verdicts):
        raise refusal(f"no candidate of {files.label} can be had", refusals)
    worse = math.inf if minutes is not None else min(WORSE, wanted)
    while seconds < whole and _no_better(verdicts, changes()) < worse:
        begun, leader = time.monotonic(), best(verdicts)
        centre = dict(plans[leader]["blocks"]) if leader in plans else _blocks(preset_of(leader), outlook.options)
        nearby = taught().best(outlook.limit, near=centre, other_than=tried())
        if nearby is None:  # all its neighbours were tried
            seconds = whole
        else:
            changed = [f"{b} {centre[b]} -> {c}" for b, c in nearby.blocks.items() if c != centre[b]]
            verdicts = add(nearby, f"{leader} with {', '.join(changed) or 'other widths'}", leader)
            seconds += time.monotonic() - begun
        keep()
    name, took = best(verdicts), keep() if len(verdicts) > judged_before else took
    if name in plans:
        plain, facts = carried_out(name)
        return Winner(name, FREE, plain, plans[name]["widths"], facts, verdicts, plans, took)
    preset = preset_of(name)
    return Winner(name, preset, starts(preset.start), None, None, verdicts, plans, took)


def preset_of(name: str) -> Method:
    """Also one that only a search of before has tried."""
    return PRESETS.get(name) or METHODS[name]


def _no_better(verdicts: Verdicts, changes: list[str]) -> int:
    """How many plans, the last of these changes, are no better than the best before them."""
    leader = best(verdicts)
    return len(changes) - (changes.index(leader) + 1 if leader in changes else 0)


def _cutter(method: Method, starts: Starts, job: Job[SlimConfig], budget: Budget) -> Cutter:
    return _rough(make_cutter(starts(method.start), method, job, budget))


def _rough(cutter: Cutter) -> Cutter:
    return replace(cutter, near=ROUGH)


def _blocks(preset: Method, options: Options) -> dict[str, Choice]:
    """What a preset makes of the blocks."""
    prefer = STARTS[preset.start].prefer
    return {block: next(choice for choice in prefer if not own[choice]) for block, own in options.items()}


def _tell(files: Files, name: str, plan: Mapping[str, Any], verdict: Mapping[str, Any], left: float) -> None:
    said = (files.label, name, plan["why"], shown(verdict), duration(left))
    logger.info("%s: %s, %s: %s; at most %s of search left", *said)
    line = {
        "search": files.label,
        "plan": name,
        **{key: plan[key] for key in ("why", "predicted", "blocks")},
        **verdict,
    }
    append_line(files.log, json.dumps(line | {"seconds_left": round(left, 1)}))
