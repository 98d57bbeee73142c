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
from rmprune.pruning.plan import Choice
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
    search = PlanSearch(network, starts, budget, job, files)
    search.try_presets()
    search.try_proposed()
    search.try_changes()
    return search.winner()


class PlanSearch:
    """One search, in its three parts, each of which goes on where the notes of `files` say that an interrupted one was.

    plans: {name: what the surrogate proposed, and why}; verdicts: of everything that was tried; seconds: that changes of the best plan
    took, of `allowed_seconds`; wanted: so many plans that are no changes.
    """

    def __init__(self, network: nn.Module, starts: Starts, budget: Budget, job: Job[SlimConfig], files: Files) -> None:
        self._begun = time.monotonic()
        self.network, self.starts, self.budget, self.job, self.files = job.here(network), starts, budget, job, files
        self.outlook = look(self.network, budget, job)
        known = read_notes(files.note("plans"))
        self.plans: dict[str, dict[str, Any]] = known.get("plans", {})
        self.verdicts: Verdicts = {}
        self.refusals: dict[str, Refusal] = {}
        minutes = job.config.search_minutes
        self.timed = minutes is not None
        self.allowed_seconds = 60 * (MINUTES if minutes is None else minutes)
        self.wanted = PROPOSED if self.timed else min(PROPOSED, len(job.data.validation) // TOLD_APART)
        self.seconds, self._took = float(known.get("seconds", 0.0)), float(known.get("took", 0.0))
        self._judged_before = len(read_notes(files.note("candidates")))
        self._lasted: list[float] = []  # seconds that each plan took
        self._carried: tuple[str, nn.Module, dict[str, Any]] | None = None
        self.presets = {
            name: preset
            for name, preset in PRESETS.items()
            if not any(self.outlook.allowed[block][choice] for block, choice in self._blocks(preset).items())
        }

    def try_presets(self) -> None:
        """Their own networks, each with its own widths; where none can be had there are more plans."""
        cutters = {
            name: functools.partial(_cutter, preset, self.starts, self.job, self.budget)
            for name, preset in self.presets.items()
        }
        self.verdicts = judge(cutters, self.budget, self.job, self.files, refusals=self.refusals)
        if not losses(
            {name: self.verdicts[name] for name in cutters}
        ):  # plans may have been judged before an interruption
            self.wanted = PROPOSED

    def try_proposed(self) -> None:
        """The presets' blocks with widths of the surrogate's, the best preset's first, then what it holds best."""
        for name in [name for name in self.plans if name not in self.verdicts]:  # an interrupted search left it
            self._judge(name)
        for found, why in itertools.islice(self._proposed(), max(0, self.wanted - self._count())):
            self._add(found, why)
        if not losses(self.verdicts):
            raise refusal(f"no candidate of {self.files.label} can be had", self.refusals)

    def try_changes(self) -> None:
        """Plans that differ in one block from the best so far, while they help and the time lasts."""
        worse = math.inf if self.timed else min(WORSE, self.wanted)
        while self.seconds < self.allowed_seconds and _no_better(self.verdicts, self._changes()) < worse:
            begun, leader = time.monotonic(), best(self.verdicts)
            centre = dict(self.plans[leader]["blocks"]) if leader in self.plans else self._blocks(preset_of(leader))
            nearby = self._taught().best(self.outlook.limit, near=centre, other_than=self._tried())
            if nearby is None:  # all its neighbours were tried
                self.seconds = self.allowed_seconds
            else:
                changed = [f"{b} {centre[b]} -> {c}" for b, c in nearby.blocks.items() if c != centre[b]]
                self._add(nearby, f"{leader} with {', '.join(changed) or 'other widths'}", leader)
                self.seconds += time.monotonic() - begun
            self._keep()

    def winner(self) -> Winner:
        """What goes on."""
        took = self._keep() if len(self.verdicts) > self._judged_before else self._took
        name = best(self.verdicts)
        if name in self.plans:
            plain, facts = self._carried_out(name)
            return Winner(name, FREE, plain, self.plans[name]["widths"], facts, self.verdicts, self.plans, took)
        preset = preset_of(name)
        return Winner(name, preset, self.starts(preset.start), None, None, self.verdicts, self.plans, took)

    @functools.cached_property
    def surrogate(self) -> Proposals:
        """As it was measured."""
        return propose(self.outlook, self.job, self.files)

    @functools.cached_property
    def unpruned(self) -> float:
        """The original's loss on the validation images."""
        data, device = self.job.data, self.job.device
        found = functools.partial(evaluate, self.network, data.validation, device=device, weights=data.class_weights)
        return remembered(self.files.note("losses"), "unpruned", lambda: found().loss)

    def _taught(self) -> Proposals:
        """The surrogate, having learned from what plans turned out to lose."""
        found = losses(self.verdicts)
        pairs = [
            (plan["parts"], found[n] - self.unpruned)
            for n, plan in self.plans.items()
            if n in found and "parts" in plan
        ]
        belief = learned([parts for parts, _ in pairs], [loss for _, loss in pairs])
        logger.info("%s: its losses count %s", self.files.label, ", ".join(f"{k} x {v:.2f}" for k, v in belief.items()))
        return self.surrogate.believing(belief)

    def _proposed(self) -> Iterator[tuple[Proposal, str]]:
        """What is tried one after the other, and why."""
        limit, found_best = self.outlook.limit, losses(self.verdicts)
        for name in sorted(self.presets, key=lambda name: found_best.get(name, math.inf)):
            near = self._blocks(self.presets[name])
            if (found := self.surrogate.best(limit, near=near, changes=0, other_than=self._tried())) is not None:
                yield found, f"the blocks of {name}"
        for apart in (max(1, len(self.outlook.options) // APART), 1):
            while (found := self._taught().best(limit, other_than=self._tried(), apart=apart)) is not None:
                yield found, f"number {len(self.plans) + 1} by the surrogate"

    def _add(self, found: Proposal, why: str, near: str | None = None) -> None:
        name = f"plan-{len(self.plans) + 1}"
        self.plans[name] = {
            "blocks": found.blocks, "widths": found.widths, "predicted": found.loss, "parts": found.parts, "why": why,
            "near": near,
        }  # fmt: skip
        self._keep()
        self._judge(name)

    def _judge(self, name: str) -> None:
        """Adds the verdict on this plan, and says it."""
        begun = time.monotonic()
        one = {name: functools.partial(self._cutter, name)}
        found = judge(one, self.budget, self.job, self.files, refusals=self.refusals)
        self.verdicts = dict(self.verdicts) | dict(found)
        self._lasted.append(time.monotonic() - begun)
        to_come = max(0, self.wanted - self._count()) * sum(self._lasted) / len(self._lasted)
        for_changes = self.allowed_seconds - self.seconds - (self._lasted[-1] if self._changes() else 0.0)
        _tell(self.files, name, self.plans[name], self.verdicts[name], to_come + max(0.0, for_changes))

    def _cutter(self, name: str) -> Cutter:
        """Plans of one network miss the time that its table of layers promises by much the same."""
        widths = self.plans[name]["widths"]
        found = _rough(make_cutter(self._carried_out(name)[0], FREE, self.job, self.budget, widths))
        before = [verdict["of_widths"] for verdict in self.verdicts.values() if "of_widths" in verdict]
        return replace(found, below=[median(before) * share for share in AROUND]) if before else found

    def _carried_out(self, name: str) -> tuple[nn.Module, dict[str, Any]]:
        """The network of a plan's blocks, and its facts; the last one is held."""
        if self._carried is None or self._carried[0] != name:
            blocks, removal = self.plans[name]["blocks"], self.job.config.removal
            self._carried = (name, *carry_out_blocks(self.network, blocks, self.job.examples, removal))
        return self._carried[1:]

    def _blocks(self, preset: Method) -> dict[str, Choice]:
        """What a preset makes of the blocks."""
        prefer = STARTS[preset.start].prefer
        options = self.outlook.options
        return {block: next(choice for choice in prefer if not own[choice]) for block, own in options.items()}

    def _tried(self) -> list[Mapping[str, Choice]]:
        return [plan["blocks"] for plan in self.plans.values()]

    def _changes(self) -> list[str]:
        """The plans that differ in one block from what was best before them; notes of before do not say which these are."""
        return [name for n, (name, plan) in enumerate(self.plans.items()) if plan.get("near", n >= self.wanted)]

    def _count(self) -> int:
        """How many plans are no changes."""
        return len(self.plans) - len(self._changes())

    def _keep(self) -> float:
        """Writes down how far the search is; returns the seconds that it took."""
        took = self._took + time.monotonic() - self._begun
        noted = {"plans": self.plans, "seconds": self.seconds, "took": took}
        write_text(self.files.note("plans"), json.dumps(noted))
        return took


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
