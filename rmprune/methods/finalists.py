"""The last round of a search: the fine-tuning of its best few candidates is begun, and what they lose then decides.

What a cut and fitted network loses says little of how it ends: networks that lost blocks lose little at first and are made up for least.
After the first epochs it can be told (`experiments/plan_ends.py`), and the winner goes on from there, so that all this takes about as
long as the fine-tuning itself (of few epochs longer: each is trained for one at least).
"""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rmprune.config import SlimConfig
from rmprune.errors import Diverged, InfeasibleBudget
from rmprune.methods.choose import Verdicts, best, losses, shown
from rmprune.methods.slim import begin
from rmprune.methods.table import Method
from rmprune.pruning import Budget
from rmprune.pruning.plan import Choice
from rmprune.runs.notes import write_text
from rmprune.training.job import Files, Job

logger = logging.getLogger("rmprune")
FEW = 4  # candidates, of the least loss,
UNLIKE = 3  # each unlike all others in one of so many blocks
Entrant = tuple[Method, nn.Module, Mapping[str, int] | None]
"""A method, the network that it prunes, widths of a plan from which it is cut: what `slim_network` takes."""


def finalists(verdicts: Verdicts, blocks: Mapping[str, Mapping[str, Choice]]) -> list[str]:
    """Names of the candidates whose fine-tuning is begun, by their loss; `blocks`: {candidate: {block: choice}}."""
    found = losses(verdicts)
    few: list[str] = []
    for name in sorted(found, key=lambda one: found[one]):
        own = blocks[name]
        unlike = max(1, len(own) // UNLIKE)
        if all(sum(choice != blocks[other][block] for block, choice in own.items()) >= unlike for other in few):
            few.append(name)
    return few[:FEW]


def begin_best(
    verdicts: Verdicts, blocks: Mapping[str, Mapping[str, Choice]], entrant: Callable[[str], Entrant], budget: Budget,
    job: Job[SlimConfig], files: Files, keep: Callable[[], object],
) -> Verdicts:  # fmt: skip
    """The verdicts, with what the `finalists` lose after the first epochs of their fine-tuning.

    It is kept with the verdicts of `judge`, and not done again, and `keep` called each time; the training of the best can go on from its
    checkpoint, that of `files` named after the candidate, the others' are gone. Nothing is begun where there is one finalist, nothing is
    fine-tuned, or channels go while that is done.
    """
    now: dict[str, dict[str, Any]] = {name: dict(verdict) for name, verdict in verdicts.items()}
    few, config = finalists(verdicts, blocks), job.config
    if len(few) < 2 or not config.finetune.epochs or config.prune.gradual:
        return now
    for number, name in enumerate(few, 1):
        if "begun" in now[name]:
            continue
        logger.info("candidate %s: its fine-tuning is begun, %d of %d", name, number, len(few))
        method, network, widths = entrant(name)
        try:
            now[name]["begun"] = begin(network, method, budget, job, files.named(f"{files.label}-{name}"), widths)
        except (Diverged, InfeasibleBudget) as error:
            logger.info("candidate %s: %s", name, error)
            now[name]["begun"] = None
        write_text(files.note("candidates"), json.dumps(now))
        keep()
    logger.info("the best unlike each other: %s", ", ".join(f"{name} {shown(now[name])}" for name in few))
    for name in few:
        if name != best(now):
            files.named(f"{files.label}-{name}").checkpoint.unlink(missing_ok=True)
    return now
