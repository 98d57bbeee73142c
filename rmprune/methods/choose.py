"""Which of several methods goes on: each cuts its network to the budget, and validation images decide before any training."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmprune.config import SlimConfig
from rmprune.data.load import Dataset
from rmprune.errors import InfeasibleBudget, UnsupportedModel
from rmprune.measure.place import Place
from rmprune.methods.cutter import make_cutter
from rmprune.methods.refuse import Refusal, refusal
from rmprune.methods.slim import met
from rmprune.methods.table import Method, alternatives
from rmprune.pruning import Budget
from rmprune.runs.notes import read_notes, write_text
from rmprune.training import evaluate

logger = logging.getLogger("rmprune")
Verdicts = Mapping[str, Mapping[str, Any]]
"""{method: {"loss": cross-entropy on the validation images} or {"refused": why it cannot be had}}."""


def judge(
    label: str,
    method: Method,
    start: Callable[[str], nn.Module],
    budget: Budget,
    config: SlimConfig,
    data: Dataset,
    original: nn.Module,
    *,
    checkpoint: Path,
    device: torch.device,
) -> Verdicts:
    """How well each candidate of `method` predicts validation images: cut once to the budget, not fine-tuned.

    `start(name)`: the network that methods start from. Budgets in measured time are met as measured against `original`. What is found
    is kept beside `checkpoint` and not looked for again. Raises InfeasibleBudget or UnsupportedModel where no candidate can.
    """
    file = checkpoint.with_name(f"{label}-candidates.json")
    verdicts: dict[str, dict[str, Any]] = read_notes(file)
    timed = budget.latency_ratio is not None
    place = Place.first(config.measure, original, data.train.example(1)) if timed else None
    refusals: dict[str, Refusal] = {}
    for name, one in alternatives(method).items():
        if name in verdicts:
            continue
        logger.info("candidate %s", name)
        try:
            cutter = make_cutter(start(one.start), one, config, data, place)
            gradual = cutter.settings.gradual and config.finetune.epochs > 0
            memory = checkpoint.with_name(f"{label}-{name}-measured.json")
            network = cutter.once(cutter.network, met(budget, cutter, place, memory, gradual=gradual)).to(device)
            loss = evaluate(network, data.validation, device=device).loss
            if not math.isfinite(loss):
                raise UnsupportedModel(f"after the cut its loss is {loss}")
            verdicts[name] = {"loss": loss}
        except (InfeasibleBudget, UnsupportedModel) as error:
            refusals[name], verdicts[name] = error, {"refused": str(error)}
        if losses(verdicts):  # where none can, the same command tries all again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(verdicts))
    if not losses(verdicts):
        raise refusal(f"no candidate of {label} can be had", refusals)
    logger.info(
        "on validation images, before fine-tuning: %s", ", ".join(f"{n} {_shown(v)}" for n, v in verdicts.items())
    )
    return verdicts


def losses(verdicts: Verdicts) -> dict[str, float]:
    """Of the methods that can be had."""
    return {name: verdict["loss"] for name, verdict in verdicts.items() if "loss" in verdict}


def best(verdicts: Verdicts) -> str:
    """The method of the least loss; of equal ones the first."""
    found = losses(verdicts)
    return min(found, key=lambda name: found[name])


def _shown(verdict: Mapping[str, Any]) -> str:
    return f"loss {verdict['loss']:.3f}" if "loss" in verdict else f"refused ({verdict['refused']})"
