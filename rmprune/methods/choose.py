"""Which of several methods goes on: each cuts its network to the budget, and validation images decide before any training."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from rmprune.config import SlimConfig
from rmprune.errors import InfeasibleBudget, NotEquivalent, UnsupportedModel
from rmprune.methods.cutter import Cutter
from rmprune.methods.refuse import Refusal, refusal
from rmprune.methods.slim import met
from rmprune.pruning import Budget
from rmprune.pruning.importance import NothingMatters
from rmprune.runs.notes import read_notes
from rmprune.runs.writing import write_text
from rmprune.training import evaluate
from rmprune.training.job import Files, Job

logger = logging.getLogger("rmprune")
Verdicts = Mapping[str, Mapping[str, Any]]
"""{method: {"loss": cross-entropy on the validation images} or {"refused": why it cannot be had}}; of a plan whose
time was measured also "of_widths": what its cut costs by the table of layers, of what its widths do."""


def judge(
    candidates: Mapping[str, Callable[[], Cutter]], budget: Budget, job: Job[SlimConfig], files: Files,
    *, refusals: dict[str, Refusal] | None = None,
) -> Verdicts:  # fmt: skip
    """How well each candidate {method: makes its cutter} predicts validation images: cut once to the budget, not fine-tuned.

    What is found is kept beside the checkpoint of `files`, whose label the candidates go by, and not looked for again. Raises
    InfeasibleBudget or UnsupportedModel where no candidate can; with `refusals` these are put there instead.
    """
    file = files.note("candidates")
    refused: dict[str, Refusal] = {} if refusals is None else refusals
    verdicts: dict[str, dict[str, Any]] = {name: {"refused": str(error)} for name, error in refused.items()}
    verdicts |= read_notes(file)
    for number, (name, make) in enumerate(candidates.items(), 1):
        if name in verdicts:
            continue
        logger.info("candidate %s%s", name, f", {number} of {len(candidates)}" if len(candidates) > 1 else "")
        try:
            cutter = make()
            cut_to = met(budget, cutter, files.named(f"{files.label}-{name}"))
            network = cutter.once(cutter.network, cut_to)
            weights = job.data.class_weights
            loss = evaluate(network.to(job.device), job.data.validation, device=job.device, weights=weights).loss
            if not math.isfinite(loss):
                raise UnsupportedModel(f"after the cut its loss is {loss}")
            verdicts[name] = {"loss": loss}
            if cutter.begin is not None and cutter.place is not None:
                verdicts[name]["of_widths"] = getattr(cut_to, cut_to.name) / cutter.begun
        except (InfeasibleBudget, UnsupportedModel) as error:
            refused[name], verdicts[name] = error, {"refused": str(error)}
        except (NothingMatters, NotEquivalent) as error:  # others may be sound
            if isinstance(error, NotEquivalent):
                logger.warning("%s is left out, its proof failed: %s", name, error)
            refused[name], verdicts[name] = UnsupportedModel(str(error)), {"refused": str(error)}
        if losses(verdicts):  # where none can, the same command tries all again
            write_text(file, json.dumps(verdicts))
    if refusals is None and not losses(verdicts):
        raise refusal(f"no candidate of {files.label} can be had", refused)
    logger.info(
        "on validation images, before fine-tuning: %s",
        ", ".join(f"{name} {shown(verdicts[name])}" for name in candidates),
    )
    return verdicts


def losses(verdicts: Verdicts) -> dict[str, float]:
    """Of the methods that can be had."""
    return {name: verdict["loss"] for name, verdict in verdicts.items() if "loss" in verdict}


def best(verdicts: Verdicts) -> str:
    """The method of the least loss; of equal ones the first."""
    found = losses(verdicts)
    return min(found, key=lambda name: found[name])


def shown(verdict: Mapping[str, Any]) -> str:
    """A verdict in words."""
    return f"loss {verdict['loss']:.3f}" if "loss" in verdict else f"refused ({verdict['refused']})"
