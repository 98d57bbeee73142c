"""The original network, narrower, trained as long as all others in total: the rival of every method. The width is found elsewhere."""

import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from rmprune.measure.widest import Widest
from rmprune.pipelines.stages import make_dense
from rmprune.runs.notes import remembered
from rmprune.training.job import Files, Job, tune


def narrower(
    job: Job[Any], files: Files, note: Path, key: str, find: Callable[[Callable[[float], nn.Module]], Widest]
) -> tuple[nn.Module, dict[str, Any]]:
    """The original network at the largest width within the budget, trained as long as all others in total.

    `find`: looks for that width, once for the file `note`, where it then stands under `key`.
    """
    config = job.config
    make = functools.partial(make_dense, config, job.data, job.seed)
    found = Widest(**remembered(note, key, lambda: asdict(find(make))))
    train = replace(config.train, epochs=config.train.epochs + config.finetune.epochs)
    return tune(make(found.width), train, job, files), {"width": found.width, "verified_ratio": found.ratio}
