"""Which of several methods goes on: each cuts its network to the budget, and validation images decide before any training."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from rmprune.config import SlimConfig
from rmprune.cutter import make_cutter
from rmprune.data import Dataset
from rmprune.errors import InfeasibleBudget, UnsupportedModel
from rmprune.methods import Method
from rmprune.pruning import Budget
from rmprune.rundir import write_text
from rmprune.slimming import met
from rmprune.timed import Place
from rmprune.training import evaluate

logger = logging.getLogger("rmprune")


def judge(
    candidates: Mapping[str, tuple[Method, nn.Module]],
    budget: Budget,
    config: SlimConfig,
    data: Dataset,
    *,
    original: nn.Module,
    checkpoint: Path,
) -> dict[str, float]:
    """{name: cross-entropy on the validation images} of each method's network, one cut to the budget and not fine-tuned.

    `candidates`: (method, the network it starts from). Budgets in measured time are met as measured against `original`. What is known
    is kept beside `checkpoint`. Methods that cannot meet the budget are left out; raises InfeasibleBudget or UnsupportedModel where
    none can.
    """
    file = checkpoint.with_name(f"{checkpoint.stem}-candidates.json")
    losses: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    refusal: Exception | None = None
    timed = budget.latency_ratio is not None
    place = Place.first(config.measure, original, data.train.example(1)) if timed else None
    for name, (method, network) in candidates.items():
        if name in losses:
            continue
        logger.info("candidate %s", name)
        try:
            cutter = make_cutter(network, method, config, data, place)
            own = met(budget, cutter, place, checkpoint.with_name(f"{checkpoint.stem}-{name}-measured.json"))
            losses[name] = evaluate(cutter.once(network, own), data.validation).loss
        except (InfeasibleBudget, UnsupportedModel) as error:
            refusal = error
            logger.info("%s is no candidate: %s", name, error)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(losses))
    if not losses:
        assert refusal is not None
        raise refusal
    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in sorted(losses.items(), key=lambda item: item[1]))
    logger.info("loss on validation images before fine-tuning: %s", shown)
    return losses
