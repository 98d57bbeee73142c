"""`amc`: train MobileNetV2, remove residuals and fuse, choose widths, fine-tune, measure, record.

A run is a directory, laid out as `slim`'s: with one seed and one budget it is the cell itself; with more, `seed0/` holds
`dense/` and `plain/`, and `seed0/macs_ratio-0.5/` is a cell with its record, a directory for each method's network
(`rm-amc/`, ...) and `search/METHOD/` (state and episodes of the search).
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from rmprune import artifact, models
from rmprune.amc.choose import Timing, choose, make_space, network_cost
from rmprune.amc.multiplier import Multiplier, require_multiplier, width_multiplier
from rmprune.amc.search import METHODS as SEARCHES
from rmprune.amc.search import SearchResult, Watcher
from rmprune.amc.space import COSTS
from rmprune.amc.table import METHODS
from rmprune.artifact.describe import describe
from rmprune.artifact.weights import load_checkpoint_into
from rmprune.config import AmcConfig, architecture
from rmprune.config.toml import to_dict
from rmprune.data.load import Dataset, load_dataset
from rmprune.errors import ConfigError
from rmprune.measure import check_available
from rmprune.measure.machine import environment
from rmprune.measure.place import Place
from rmprune.methods.start import CALIBRATION_IMAGES
from rmprune.models.families import SMALL_IMAGE
from rmprune.pipelines.stages import measure_networks, pick_device, stage, training_log, with_weights
from rmprune.pruning.gradual import PolicyPruner
from rmprune.removal import Removal, remove_residuals, remove_where_faster
from rmprune.runs import records
from rmprune.runs.cells import Cell, plan_cells, unfinished
from rmprune.runs.directory import claim
from rmprune.runs.notes import remembered
from rmprune.training import fit

logger = logging.getLogger("rmprune")
GRADUAL_CUTS = 20  # small cuts in which a policy is reached while training


def run_amc(config: AmcConfig, *, command: str) -> list[Path]:
    """Do the whole job and return the records. Goes on where an interrupted run of the same settings was."""
    for name in config.method:
        if name not in METHODS:
            raise ConfigError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
        if METHODS[name].search == "agent" and config.search.episodes <= config.search.warm_up:
            raise ConfigError(
                f"{name}: all {config.search.episodes} episodes are random, as warm_up is {config.search.warm_up}; "
                "give more --episodes or a smaller --warm-up, or use a method with random search"
            )
    budgets = [(f"{config.search.constraint}_ratio", value) for value in config.search.budget]
    cells = plan_cells(config.directory, config.seed, config.seeds, budgets)
    device = pick_device(config.device)
    data = load_dataset(config.data)
    _refuse_early(config, data, cells)
    found, networks = [cell.record for cell in cells], {"dense", "plain", *METHODS}
    with claim(config.directory, config, records=found, networks=networks, overwrite=config.overwrite):
        for cell in unfinished(cells):
            _Run(config, cell, data, device).finish(command)
    return found


def make_original(config: AmcConfig, data: Dataset, seed: int, width: float | None = None) -> nn.Module:
    """The network before training, from its seed; `width` in the place of the config's."""
    settings = architecture(config) | {"free": config.free if config.free > 1 else None}
    settings["width"] = width or config.width
    if settings["width"] is not None and not config.model.startswith("mobilenet"):
        settings["width"] = int(settings["width"])  # channels, not a multiplier
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in settings:
        if not models.accepts(config.model, name):
            raise ConfigError(f"{config.model} has no setting {name}; leave --{name.replace('_', '-')} out")
    if models.accepts(config.model, "small_images") and max(data.input_shape[1:]) <= SMALL_IMAGE:
        settings["small_images"] = True
    torch.manual_seed(seed)
    return models.create(config.model, num_classes=data.num_classes, in_channels=data.input_shape[0], **settings).eval()


def _refuse_early(config: AmcConfig, data: Dataset, cells: list[Cell]) -> None:
    """Infeasible budgets are refused before a file is written or an epoch trained (measured time: once it is measured)."""
    check_available(config.measure.backends, config.measure.device)
    dense, example = make_original(config, data, config.seed), data.train.example(2)
    describe(dense)
    if "uniform" in config.method:
        require_multiplier(config)
    if (cells[0].shared / "plain").exists() and not config.overwrite:
        return
    networks = {
        plain: _without_residuals(config, dense, example) if plain else dense
        for plain in {METHODS[name].plain for name in config.method if METHODS[name].search is not None}
    }
    if config.search.constraint == "latency":
        return
    for name in config.method:
        for ratio in config.search.budget:
            if METHODS[name].search is None:
                width_multiplier(
                    lambda width: make_original(config, data, config.seed, width), dense, example, config, ratio, None
                )
    for network in networks.values():
        for ratio in config.search.budget:
            make_space(network, dense, example, config.search, ratio)


def _without_residuals(config: AmcConfig, dense: nn.Module, example: Tensor) -> nn.Module:
    settings = config.removal
    return remove_residuals(
        dense, example, keep=settings.keep, ranges=settings.ranges, form=settings.form, fuse=settings.fuse
    ).model


class _Run:
    """The stages of one cell, in the order of their methods' names in `finish`."""

    def __init__(self, config: AmcConfig, cell: Cell, data: Dataset, device: torch.device) -> None:
        self.config, self.cell, self.data, self.device = config, cell, data, device
        self.example = data.train.example(2)
        self.timing: Timing | None = None

    def finish(self, command: str) -> None:
        """Every stage that is not done yet, then the record."""
        config, cell = self.config, self.cell
        facts = {"input_shape": list(self.data.input_shape)}
        dense = stage(cell.shared / "dense", lambda: (self.train(cell.shared, "dense"), facts))
        found: dict[str, nn.Module] = {"original": dense}
        removal: dict[str, Any] | None = None
        if any(METHODS[name].plain for name in config.method):
            found["plain"] = stage(cell.shared / "plain", lambda: self.remove(dense), onnx=self.example[:1])
            removal = artifact.read_extra(cell.shared / "plain")["removal"]
        if config.search.constraint == "latency":
            self.timing = Timing(dense, self.example, config.measure, cache=cell.shared / "latency.json")
        for name in config.method:
            base = found["plain"] if METHODS[name].plain else dense
            make = functools.partial(self.slim, name, base, dense)
            found[name] = stage(cell.directory / name, make, onnx=self.example[:1])
        logger.info("measuring %s", ", ".join(found))
        entries = measure_networks(found, self.data, config.measure, self.device)
        for name in config.method:
            entries[name]["method"] = name
            facts = artifact.read_extra(cell.directory / name)
            entries[name] |= {key: facts[key] for key in ("search", "removal") if key in facts}
        record = {
            "schema": records.SCHEMA,
            "command": command,
            "config": to_dict(config),
            "seed": cell.seed,
            "model": config.model,
            "dataset": config.data.dataset,
            "input_shape": list(self.data.input_shape),
            "method": ",".join(config.method),
            "budget": {cell.kind: cell.value},
            "environment": environment(),
            "removal": removal,
            "training": training_log(cell.shared, cell.directory),
            **entries,
        }
        records.write_record(cell.record, record)

    def train(self, directory: Path, label: str, width: float | None = None, more_epochs: int = 0) -> nn.Module:
        """The original network, or one of another width, trained from its seed (or loaded)."""
        model = make_original(self.config, self.data, self.cell.seed, width)
        if self.config.checkpoint is not None and width is None:
            return load_checkpoint_into(model, self.config.checkpoint, self.config.model)
        return fit(
            model,
            self.data,
            replace(self.config.train, epochs=self.config.train.epochs + more_epochs),
            seed=self.cell.seed,
            device=self.device,
            checkpoint=directory / "checkpoint" / f"{label}.pt",
            log=directory / "log.jsonl",
            label=label,
        ).cpu()

    def remove(self, dense: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """RM and fusing, with batch norms measured on training images."""
        settings = self.config.removal
        removal = remove_residuals(
            with_weights(make_original(self.config, self.data, self.cell.seed), dense),  # its modules name its blocks
            self.data.train.example(CALIBRATION_IMAGES),
            keep=settings.keep,
            ranges=settings.ranges,
            form=settings.form,
            fuse=settings.fuse,
        )
        logger.info(
            "removed %d residuals, kept %d; largest error %.1e",
            len(removal.removed),
            len(removal.kept),
            removal.max_error,
        )
        return removal.model, {"removal": removal.facts}

    def slim(self, name: str, base: nn.Module, dense: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """A method's network, trained to its end, and what its search found."""
        config, cell, search = self.config, self.cell, METHODS[name].search
        if search is None:
            return self.narrow(name, dense)
        directory = cell.directory / "search" / name
        if self.timing is None:
            space = make_space(base, dense, self.example, config.search, cell.value)
        else:
            space = self.timing.space(base, config.search, cell.value, directory / "budget.json")
        episodes = 1 if search == "uniform" else config.search.episodes
        with search_bar(f"{name}: {SEARCHES[search].split(',')[0]}", episodes, space.budget) as watch:
            chosen = choose(
                base,
                space,
                search,
                config.search,
                self.data,
                seed=cell.seed,
                device=self.device,
                ratio=cell.value,
                directory=directory,
                timing=self.timing,
                watch=watch,
            )
        model = self.finetune(name, base, chosen.model, chosen.widths, dense)
        if not METHODS[name].mixed:
            return model, {"search": chosen.facts}
        removal = self.remove_faster(model, dense)
        logger.info("%s: removed %s", name, ", ".join(removal.removed) or "no residual, none made it faster")
        return removal.model, {"search": chosen.facts, "removal": removal.facts}

    def remove_faster(self, model: nn.Module, dense: nn.Module) -> Removal:
        """RM for those residuals whose removal makes the network faster and leaves it within a budget in MACs or parameters."""
        config, example = self.config, self.data.train.example(1)
        place = self.timing.place if self.timing else Place.first(config.measure, dense, example)

        def fits(network: nn.Module) -> bool:
            if config.search.constraint == "latency":
                return True
            cost = COSTS[config.search.constraint]
            return network_cost(network, example, cost) <= self.cell.value * network_cost(dense, example, cost)

        return remove_where_faster(model, self.example, place.ratios, fits)

    def finetune(
        self, name: str, base: nn.Module, pruned: nn.Module, widths: dict[str, int], teacher: nn.Module
    ) -> nn.Module:
        """Train what is left, after one cut or cutting on the way; with the original network as teacher."""
        config, hook = self.config, None
        if config.apply == "gradual" and config.finetune.epochs > 0:
            steps = self.data.train.num_batches(self.data.config.batch_size, shuffled=True) * config.prune_epochs
            pruned = base
            hook = PolicyPruner(
                base, self.example, widths, prune_epochs=config.prune_epochs, every=max(1, int(steps / GRADUAL_CUTS))
            )
        return fit(
            pruned,
            self.data,
            config.finetune,
            seed=self.cell.seed,
            device=self.device,
            hook=hook,
            teacher=teacher,
            teacher_memory=self.cell.shared / "checkpoint" / "teacher",
            checkpoint=self.cell.directory / "checkpoint" / f"{name}.pt",
            log=self.cell.directory / "log.jsonl",
            label=name,
        ).cpu()

    def narrow(self, name: str, dense: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The original network at the largest width multiplier within the budget, trained as long as all others in total."""
        file = self.cell.directory / "search" / name / "multiplier.json"
        make = lambda width: make_original(self.config, self.data, self.cell.seed, width)  # noqa: E731
        find = lambda: asdict(  # noqa: E731
            width_multiplier(make, dense, self.example, self.config, self.cell.value, self.timing)
        )
        found = Multiplier(**remembered(file, "multiplier", find))
        model = self.train(self.cell.directory, name, found.width, more_epochs=self.config.finetune.epochs)
        return model, {"search": {"method": "width multiplier", "width": found.width, "verified_ratio": found.ratio}}


@contextmanager
def search_bar(label: str, total: int, budget: float) -> Iterator[Watcher]:
    """Yields the watcher that moves the bar; costs are shown as parts of `budget`."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)

        def watch(result: SearchResult) -> None:
            best, done = result.best, len(result.episodes)
            text = f"{label}  best reward {best.reward:.4f} at {100 * best.cost / budget:.0f} % of the budget"
            progress.update(task, completed=done, description=text)
            if done == total or (not console.is_terminal and done % max(1, total // 4) == 0):
                logger.info("%s  (%d of %d episodes, %.0f s)", text, done, total, result.seconds)

        yield watch
