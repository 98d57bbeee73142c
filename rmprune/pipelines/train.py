"""`train`: train a network, deploy it by RM, measure both, record. For networks that need no pruning to be plain (RepVGG, RMNeXt)."""

from dataclasses import replace
from pathlib import Path

from rmprune.artifact.describe import describe
from rmprune.config import TrainRunConfig
from rmprune.data.load import Load, load_dataset
from rmprune.measure import check_available
from rmprune.pipelines.stages import (
    at_work,
    dense_network,
    finish,
    make_dense,
    open_data,
    pick_device,
    starting_network,
)
from rmprune.removal import plan_removal
from rmprune.removal.remove import nothing_to_remove
from rmprune.runs.cells import Cell
from rmprune.runs.directory import refuse_used
from rmprune.training.job import Job


def run_train(config: TrainRunConfig, *, command: str, load: Load = load_dataset) -> list[Path]:
    """Do the job and return the record. Goes on where an interrupted run of the same settings was. Raises UnsupportedModel before training
    where no residual can be removed."""
    root = config.directory
    cell = Cell(config.seed, "", 0.0, root, root)
    refuse_used(root, config, [cell.record], overwrite=config.overwrite)
    job = Job(config, open_data(config, load), pick_device(config.device), config.seed)
    check_available(config.measure.backends, config.measure.device)
    model = make_dense(config, job.data, config.seed)
    describe(model)
    plan = plan_removal(model, job.data.train.example(2))
    if not any(block.removable for block in plan):  # known before training
        raise nothing_to_remove({block.name: block.reason for block in plan})
    with at_work(job, [cell.record], {"dense", "plain"}):
        dense = dense_network(job, cell)
        plain = starting_network(replace(job, teacher=dense), cell, "plain")
        networks = {"original": dense, "plain": plain}
        return [finish(job, cell, command, networks, methods=["train"])]
