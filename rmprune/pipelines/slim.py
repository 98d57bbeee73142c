"""`slim`: train sparse, remove residuals, prune, fine-tune, measure, record.

A run is a directory. With one seed and one budget it is the cell itself; with more, `seed0/` holds what the cells of a seed share
(`dense/`, `plain/`) and `seed0/macs_ratio-0.5/` is a cell. Every stage leaves an artifact; what is there is not done again.
"""

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmprune import artifact
from rmprune.artifact.describe import describe
from rmprune.artifact.weights import load_checkpoint_into
from rmprune.config import SlimConfig, architecture
from rmprune.config.toml import to_dict
from rmprune.data.load import Dataset, load_dataset
from rmprune.errors import ConfigError, InfeasibleBudget
from rmprune.measure import check_available, count_macs
from rmprune.measure.machine import environment
from rmprune.methods.choose import best, judge
from rmprune.methods.refuse import Refusal, check_budgets, refusal, skip
from rmprune.methods.slim import slim_network
from rmprune.methods.start import STARTING
from rmprune.methods.table import METHODS, Method, find_methods
from rmprune.models.families import create_network
from rmprune.pipelines.stages import measure_networks, pick_device, stage, training_log, with_weights
from rmprune.pruning import Budget
from rmprune.runs import records
from rmprune.runs.cells import Cell, plan_cells, unfinished
from rmprune.runs.directory import claim
from rmprune.training import fit
from rmprune.training.sparsity import ProximalL1, add_shortcut_scales

logger = logging.getLogger("rmprune")
NOTES = ("method", "chosen", "candidates", "removal", "collapsed")
"""Facts of a network's artifact that the record repeats."""


def run_slim(config: SlimConfig, *, command: str) -> list[Path]:
    """Do the main job and return the records. Goes on where an interrupted run of the same settings was."""
    methods = find_methods(config.method)
    cells = plan_cells(config.directory, config.seed, config.seeds, config.prune.budgets)
    device = pick_device(config.device)
    data = load_dataset(config.data)
    _refuse_early(config, methods, data)
    found, networks = [cell.record for cell in cells], {"dense", "pruned", *STARTING, *METHODS}
    with claim(config.directory, config, records=found, networks=networks, overwrite=config.overwrite):
        for cell in unfinished(cells):
            _run_cell(cell, config, methods, data, device, command)
    return found


def _refuse_early(config: SlimConfig, methods: dict[str, Method], data: Dataset) -> None:
    """Everything that can be refused is refused before a file is written or an epoch trained."""
    check_available(config.measure.backends, config.measure.device)
    for name, method in methods.items():
        if method.candidates and config.prune.ratio:
            raise ConfigError(
                f"{name} compares networks of equal cost, which --ratio does not give; use --macs-ratio or --latency-ratio"
            )
    example = data.train.example(2)
    dense = make_dense(config, data, config.seed)
    describe(dense)
    reference = count_macs(dense, example[:1])
    budgets = [Budget.from_config(config.prune, *budget, reference_macs=reference) for budget in config.prune.budgets]

    @functools.cache
    def network(name: str) -> nn.Module:
        return STARTING[name](dense, lambda images: example[:images])[0]

    check_budgets(lambda method: network(method.start), dense, methods, budgets, config, data)


def _run_cell(
    cell: Cell, config: SlimConfig, methods: dict[str, Method], data: Dataset, device: torch.device, command: str
) -> None:
    facts = {"input_shape": list(data.input_shape)}
    dense = stage(cell.shared / "dense", lambda: (train_dense(config, data, cell.seed, device, cell.shared), facts))
    found: dict[str, nn.Module] = {"original": dense}
    example = data.train.example(1)
    names = sorted({method.start for method in methods.values()})
    starts = {name: starting_network(dense, cell.shared, config, data, cell.seed, name) for name in names}
    removal: dict[str, Any] | None = None
    if "plain" in starts:
        found["plain"], removal = starts["plain"], artifact.read_extra(cell.shared / "plain")["removal"]
    notes: dict[str, dict[str, Any]] = {}  # what the record says of a network besides its figures
    refused: dict[str, Refusal] = {}
    budget = Budget.from_config(config.prune, cell.kind, cell.value, reference_macs=count_macs(dense, example))
    for name, method in methods.items():
        key = "pruned" if name == "rm" else name

        def slim(name: str = name, method: Method = method) -> tuple[nn.Module, dict[str, Any]]:
            label, begin = name, starts[method.start]
            made: dict[str, Any] = {"method": name}
            checkpoint = cell.directory / "checkpoint" / f"{name}.pt"
            if method.candidates:
                start_of = functools.partial(starting_network, dense, cell.shared, config, data, cell.seed)
                verdicts = judge(
                    name, method, start_of, budget, config, data, dense, checkpoint=checkpoint, device=device
                )
                chosen = best(verdicts)
                method, label, begin = METHODS[chosen], f"{name}-{chosen}", start_of(METHODS[chosen].start)
                made |= {"chosen": chosen, "candidates": verdicts}
            slimmed, more = slim_network(
                begin,
                method,
                budget,
                config,
                data,
                seed=cell.seed,
                device=device,
                teacher=dense,
                teacher_memory=cell.shared / "checkpoint" / "teacher",
                checkpoint=checkpoint.with_name(f"{label}.pt"),
                log=cell.directory / "log.jsonl",
                label=label,
            )
            if method.start != "dense":
                begun = artifact.read_extra(cell.shared / method.start)
                made |= {field: begun[field] for field in ("removal", "collapsed") if field in begun}
            return slimmed, made | more

        try:
            found[key] = stage(cell.directory / key, slim, onnx=example)
        except InfeasibleBudget as error:
            skip(name, error, config)
            refused[name] = error
            continue
        facts = artifact.read_extra(cell.directory / key)
        notes[key] = {field: facts[field] for field in NOTES if field in facts}
    if len(refused) == len(methods):
        raise refusal("no method can be had", refused)
    logger.info("measuring %s", ", ".join(found))
    entries = measure_networks(found, data, config.measure, device)
    record = {
        "schema": records.SCHEMA,
        "command": command,
        "config": to_dict(config),
        "seed": cell.seed,
        "model": config.model,
        "dataset": config.data.dataset,
        "input_shape": list(data.input_shape),
        "method": ",".join(name for name in methods if name not in refused),
        "budget": {cell.kind: cell.value},
        "environment": environment(),
        "removal": removal,
        "training": training_log(cell.shared, cell.directory),
        **{name: entry | notes.get(name, {}) for name, entry in entries.items()},
    }
    if refused:
        record["refused"] = {name: str(error) for name, error in refused.items()}
    records.write_record(cell.record, record)


def starting_network(
    dense: nn.Module, directory: Path, config: SlimConfig, data: Dataset, seed: int, name: str
) -> nn.Module:
    """What methods prune: the trained network itself ("dense"), or one made of it, an artifact of that name in `directory`."""
    if name == "dense":
        return dense
    named = with_weights(make_dense(config, data, seed), dense)
    return stage(directory / name, functools.partial(start, name, named, data), onnx=data.train.example(1))


def start(name: str, dense: nn.Module, data: Dataset) -> tuple[nn.Module, dict[str, Any]]:
    """A network of `rmprune.methods.start`, made of the trained one, and the facts for its artifact; says what was done."""
    network, facts = STARTING[name](dense, data.train.example)
    if removal := facts.get("removal"):
        gone, stay, error = len(removal["removed"]), len(removal["kept"]), removal["max_error"]
        logger.info("removed %d residuals, kept %d; largest error %.1e", gone, stay, error)
    if explained := facts.get("collapsed"):
        least, most = min(explained.values()), max(explained.values())
        logger.info("one convolution for %d blocks; it gives %.2f to %.2f of the variance", len(explained), least, most)
    return network, facts


def make_dense(config: SlimConfig, data: Dataset, seed: int) -> nn.Module:
    """The network before training, from its seed; or with the weights of --checkpoint."""
    torch.manual_seed(seed)
    model = create_network(
        config.model, num_classes=data.num_classes, input_shape=data.input_shape, **architecture(config)
    )
    if config.sparsity.shortcut_scales:
        model = add_shortcut_scales(model, data.train.example(2))
    if config.checkpoint is not None:
        model = load_checkpoint_into(model, config.checkpoint, config.model)
    return model.eval()


def train_dense(config: SlimConfig, data: Dataset, seed: int, device: torch.device, directory: Path) -> nn.Module:
    """Train with sparsity, unless a checkpoint of trained weights was given."""
    model = make_dense(config, data, seed)
    if config.checkpoint is not None:
        return model
    return fit(
        model,
        data,
        config.train,
        seed=seed,
        device=device,
        hook=ProximalL1(config.sparsity) if config.sparsity.strength else None,
        checkpoint=directory / "checkpoint" / "dense.pt",
        log=directory / "log.jsonl",
        label="dense",
    ).cpu()
