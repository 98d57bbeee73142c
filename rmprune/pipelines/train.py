"""`train`: train a network, deploy it by RM, measure both, record. For networks that need no pruning to be plain (RepVGG, RMNeXt)."""

from dataclasses import replace
from pathlib import Path

from rmprune import artifact
from rmprune.artifact.describe import describe
from rmprune.config import TrainRunConfig
from rmprune.data.load import load_dataset
from rmprune.measure import check_available
<<<<<<< HEAD
from rmprune.measure.machine import environment
from rmprune.models.families import create_network
from rmprune.pipelines.slim import start
from rmprune.pipelines.stages import measure_networks, pick_device, stage, training_log, with_weights
=======
from rmprune.pipelines.stages import dense_network, finish, make_dense, pick_device, starting_network
>>>>>>> main
from rmprune.removal import plan_removal
from rmprune.runs.cells import Cell
from rmprune.runs.directory import claim
from rmprune.training.job import Job


def run_train(config: TrainRunConfig, *, command: str) -> list[Path]:
    """Do the job and return the record. Goes on where an interrupted run of the same settings was."""
    root = config.directory
    job = Job(config, load_dataset(config.data), pick_device(config.device), config.seed)
    cell = Cell(config.seed, "", 0.0, root, root)
    check_available(config.measure.backends, config.measure.device)
    model = make_dense(config, job.data, config.seed)
    describe(model)
<<<<<<< HEAD
    plan_removal(model, data.train.example(2))  # refuse a network without residuals before training it
    found, networks = [root / records.RECORD], {"dense", "plain"}
    with claim(root, config, records=found, networks=networks, overwrite=config.overwrite):
        return [_finish(config, model, data, device, command)]


def _finish(config: TrainRunConfig, model: nn.Module, data: Dataset, device: torch.device, command: str) -> Path:
    """Every stage that is not done yet, then the record."""
    root = config.directory

    def trained() -> nn.Module:
        return fit(
            model,
            data,
            config.train,
            seed=config.seed,
            device=device,
            checkpoint=root / "checkpoint" / "dense.pt",
            log=root / "log.jsonl",
            label="dense",
        ).cpu()

    dense = stage(root / "dense", lambda: (trained(), {"input_shape": list(data.input_shape)}))
    plain = stage(
        root / "plain",
        lambda: start("plain", with_weights(model, dense), data),
        onnx=data.train.example(1),
    )
    record = {
        "schema": records.SCHEMA,
        "command": command,
        "config": to_dict(config),
        "seed": config.seed,
        "model": config.model,
        "dataset": config.data.dataset,
        "input_shape": list(data.input_shape),
        "method": "train",
        "environment": environment(),
        "removal": artifact.read_extra(root / "plain")["removal"],
        "training": training_log(root),
        **measure_networks({"original": dense, "plain": plain}, data, config.measure, device),
    }
    return records.write_record(root / records.RECORD, record)


def make_network(config: TrainRunConfig, data: Dataset) -> nn.Module:
    """The network before training, from its seed."""
    torch.manual_seed(config.seed)
    return create_network(
        config.model,
        num_classes=data.num_classes,
        input_shape=data.input_shape,
        **architecture(config),
    ).eval()
=======
    plan_removal(model, job.data.train.example(2))  # refuse a network without residuals before training it
    with claim(root, config, records=[cell.record], networks={"dense", "plain"}, overwrite=config.overwrite):
        dense = dense_network(job, cell)
        plain = starting_network(replace(job, teacher=dense), cell, "none", "removed")
        removal = artifact.read_extra(root / "plain")["removal"]
        networks = {"original": dense, "plain": plain}
        return [finish(job, cell, command, networks, methods=["train"], removal=removal)]
>>>>>>> main
