"""What the pipelines share: one stage and its artifact, the dense network, the record. No order of stages."""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from rmprune import artifact
from rmprune.artifact.weights import load_checkpoint_into, start_from
from rmprune.config import REMOVAL, MeasureConfig, RunConfig, SlimConfig, architecture
from rmprune.config.toml import to_dict
from rmprune.data.load import Dataset, Load, load_dataset
from rmprune.data.splits import IMAGENET_STATISTICS, Statistics
from rmprune.errors import ArtifactError, ConfigError, RmpruneError
from rmprune.graph.copied import copied
from rmprune.graph.outline import outline
from rmprune.graph.tf32 import tf32
from rmprune.measure import (
    activation_memory,
    calibration_images,
    count_macs,
    count_params,
    measure_latencies,
    needs_calibration,
)
from rmprune.measure.latency import Configuration, sittings_of
from rmprune.measure.machine import environment
from rmprune.methods.start import start
from rmprune.models.families import create_network
from rmprune.models.pretrained import IMAGENET, image_statistics
from rmprune.pipelines.unread import unread
from rmprune.runs import records
from rmprune.runs.cells import Cell
from rmprune.runs.directory import claim
from rmprune.runs.writing import LOCK_FILE
from rmprune.training.distributed import check_batch, check_device
from rmprune.training.evaluation import evaluate, logits_of, scores
from rmprune.training.job import Files, Job, tune
from rmprune.training.precision import repeatable
from rmprune.training.sparsity import ProximalL1, add_shortcut_scales

logger = logging.getLogger("rmprune")
NOTES = ("method", "chosen", "candidates", "search", "removal", "collapsed", "cut_error", "plan")
"""Facts of a network's artifact that the record repeats."""


def expected_statistics(model: str, weights: str | None) -> Statistics:
    """What photos are normalised with where training starts from these weights: as the library's own expect, else as ImageNet's."""
    return image_statistics(model) if weights == IMAGENET else IMAGENET_STATISTICS


def open_data(config: RunConfig, load: Load = load_dataset) -> Dataset:
    """The data set of a run."""
    data = load(config.data, expected_statistics(config.model, config.weights))
    check_batch(min(config.data.batch_size, len(data.train), len(data.validation)))
    return data


@contextlib.contextmanager
def at_work(
    job: Job[RunConfig], records: list[Path], networks: Collection[str], *, wait: bool = False,
    free: Collection[str] = (),
) -> Iterator[None]:  # fmt: skip
    """The run's directory is this process's (`claim`); what is computed there is in full float32, and repeats itself
    where that is asked for."""
    config = job.config
    claimed = claim(
        config.directory, config, records=records, networks=networks, overwrite=config.overwrite, wait=wait,
        photos=job.data.photos, free=free,
    )  # fmt: skip
    with repeatable(config.deterministic, job.device), tf32(False, job.device), claimed:
        yield


def stage(
    directory: Path, make: Callable[[], tuple[nn.Module, dict[str, Any]]], onnx: torch.Tensor | None = None
) -> nn.Module:
    """The network of a finished stage from its artifact, or made now and saved with its facts. A damaged one is refused first."""
    if directory.exists():
        return artifact.load(directory)
    model, facts = make()
    if onnx is not None:
        facts = {"input_shape": list(onnx.shape[1:])} | facts
    artifact.save(model, directory, example_inputs=onnx, extra=facts)
    return artifact.load(directory)


def make_dense(
    config: RunConfig, data: Dataset, seed: int, width: float | None = None, *,
    tell: Callable[[str], None] = logger.debug,
) -> nn.Module:  # fmt: skip
    """The network of a run before training, from its seed, --weights or --checkpoint. In eval mode.

    `width`: in the place of the config's, and then without these; `tell` hears what became of the weights. Raises
    ConfigError for a setting that the network does not take, ArtifactError for the weights of another network.
    """
    settings = architecture(config) | ({} if width is None else {"width": width})
    torch.manual_seed(seed)
    model = create_network(config.model, num_classes=data.num_classes, input_shape=data.input_shape, **settings)
    if config.weights is not None and width is None:
        said = start_from(model, config.weights, config.model, by_order=config.weights_by_order)
        tell(f"starts from {config.weights}" + (f": {said}" if said else ""))
    if isinstance(config, SlimConfig) and config.sparsity.shortcut_scales:
        model = add_shortcut_scales(model, data.train.example(2))
    checkpoint = getattr(config, "checkpoint", None)
    if checkpoint is not None and width is None:
        model = load_checkpoint_into(model, checkpoint, config.model)
    return model.eval()


def dense_network(job: Job[RunConfig], cell: Cell) -> nn.Module:
    """The trained network that the cells of a seed share: `dense/`, trained (with sparsity) unless a checkpoint of it was given."""
    config = job.config

    def make() -> tuple[nn.Module, dict[str, Any]]:
        if job.given is not None:
            return job.given, {"input_shape": list(job.data.input_shape), "given_with": job.given_with}
        model = make_dense(config, job.data, job.seed, tell=logger.info)
        if getattr(config, "checkpoint", None) is None:
            sparsity = getattr(config, "sparsity", None)
            hook = ProximalL1(sparsity) if sparsity is not None and sparsity.strength else None
            model = tune(model, config.train, job, Files.of(cell.shared, "dense"), hook)
        return model, {"input_shape": list(job.data.input_shape)}

    return stage(cell.shared / "dense", make)


def with_names(dense: nn.Module, job: Job[RunConfig]) -> nn.Module:
    """The trained network, which an artifact holds as one flat graph, with the modules that name its blocks."""
    if job.given is not None:
        return copied(job.given)
    network = make_dense(replace(job.config, weights=None, weights_by_order=False), job.data, job.seed)
    network.load_state_dict(dense.state_dict())
    return network


def starting_network(job: Job[RunConfig], cell: Cell, name: str) -> nn.Module:
    """What methods prune, by its name in STARTS: the trained network (the job's teacher), or one made of it, which a seed's cells share."""
    if name == "dense":
        return job.original
    examples = job.data.train.example if name == "plain" else job.examples  # fits of blocks take as many as pruning

    def make() -> tuple[nn.Module, dict[str, Any]]:
        settings = getattr(job.config, "removal", REMOVAL)
        network, facts = start(with_names(job.original, job), name, examples, settings)
        say(facts)
        return network, facts

    # Searches in two cells of a grid may start from one that is not there yet; a run whose own folder this is holds its lock already.
    held = cell.shared == job.config.directory or (cell.shared / name).exists()
    with contextlib.nullcontext() if held else FileLock(cell.shared / LOCK_FILE):
        return stage(cell.shared / name, make, onnx=job.data.train.example(1))


def say(facts: Mapping[str, Any]) -> None:
    """Log what was removed and collapsed, by an artifact's facts."""
    if removal := facts.get("removal"):
        gone, stay, error = len(removal["removed"]), len(removal["kept"]), removal["max_error"]
        note = removal.get("note") and f" ({removal['note']})"
        logger.info("removed %d residuals, kept %d; largest error %.1e%s", gone, stay, error, note or "")
    if explained := facts.get("collapsed"):
        least, most = min(explained.values()), max(explained.values())
        logger.info("one convolution for %d blocks; it gives %.2f to %.2f of the variance", len(explained), least, most)


def finish(
    job: Job[RunConfig], cell: Cell, command: str, networks: dict[str, nn.Module], *, methods: list[str],
    refused: Mapping[str, str] | None = None, measure: MeasureConfig | None = None,
) -> Path:  # fmt: skip
    """Measure the networks of a cell, the trained one as "original" and its plain form as "plain", and write its record, which says too
    what of its settings nothing read; returns its path.

    `methods`: that made them; `refused`: {method: why not}; `measure`: in the place of what the settings say.
    """
    record: dict[str, Any] = {
        "schema": records.SCHEMA,
        "command": command,
        "config": to_dict(replace(job.config, measure=measure or job.config.measure)),
        "unread": unread(job.config),
        "seed": job.seed,
        "model": job.config.model,
        "dataset": job.config.data.dataset,
        **({"photos": job.data.photos} if job.data.photos else {}),
        "input_shape": list(job.data.input_shape),
        "normalization": None if job.data.statistics is None else job.data.statistics._asdict(),
        "method": ",".join(methods),
        **({"budget": cell.budget} if cell.budget else {}),
        "environment": environment(),
        "removal": artifact.read_extra(cell.shared / "plain", "removal")["removal"] if "plain" in networks else None,
        "training": records.training_log(cell.shared, cell.directory),
        **measure_networks(networks, job.data, measure or job.config.measure, job.device),
        **({"refused": refused} if refused else {}),
    }
    for name in [name for name in networks if name not in ("original", "plain")]:
        facts = {"method": name} | artifact.read_extra(cell.directory / name)
        record[name] |= {note: facts[note] for note in NOTES if note in facts}
    return records.write_record(cell.record, record)


def measuring(networks: int, measure: MeasureConfig) -> Callable[[str], None]:
    """Logs each configuration as it starts and the time left of those planned: by the settings at first, then by those that are done."""
    places = itertools.product(measure.backends, [measure.device], measure.threads, measure.batch_sizes)
    planned = [sittings_of(Configuration(*place), measure.seconds) if networks > 1 else 1 for place in places]
    started, done, total = time.perf_counter(), itertools.count(), sum(planned)

    def tell(configuration: str) -> None:
        n = next(done)
        each = (time.perf_counter() - started) / n if n else networks * measure.seconds * len(planned) / total
        left = (
            f"{n + 1} of {total}, {(total - n) * each / 60:.1f} min left"
            if n < total
            else "once more, not known well yet"
        )
        logger.info("measuring %d networks, %s: %s", networks, configuration, left)

    return tell


def measure_networks(
    networks: dict[str, nn.Module], data: Dataset, config: MeasureConfig, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Test accuracy and what goes with it (read here only), MACs, parameters, layers and times of each network, as record entries."""
    example = data.test.example(1)
    latencies = measure_latencies(
        networks,
        example,
        **vars(config),
        reference="original",
        calibration=calibration_images(data.train) if needs_calibration(config.backends) else None,
        split=data.test,
        progress=measuring(len(networks), config),
    )
    return {
        name: {
            **_how_good(model.to(device), data, device),
            "validation": on_validation(model, data, device),
            "macs": count_macs(model.cpu(), example),
            "params": count_params(model),
            **_activations(model, example),
            **outline(model, example),
            "latency": [latency.to_dict() for latency in latencies[name]],
        }
        for name, model in networks.items()
    }


def _activations(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """The peak of activations of one image; nothing of a network whose shapes cannot be had without its values."""
    with contextlib.suppress(RuntimeError, RmpruneError):
        return {"activation_bytes": activation_memory(model, example).peak_bytes}
    return {}


def on_validation(model: nn.Module, data: Dataset, device: torch.device) -> dict[str, float | None]:
    """What choices among finished networks look at: accuracy (None where the data have a loss of their own) and loss."""
    found = evaluate(model, data.validation, device=device)
    return {name: value if math.isfinite(value) else None for name, value in asdict(found).items()}


def _how_good(model: nn.Module, data: Dataset, device: torch.device) -> dict[str, Any]:
    if data.test.loss is not None:
        return {"accuracy": None, "loss": evaluate(model, data.test, device=device).loss}
    return scores(*logits_of(model, data.test, device=device), data.classes)


def image_shape(known: Any, where: Path) -> tuple[int, int, int]:
    """(C, H, W) as a file tells it; ArtifactError where it tells none, or more than 2**26 values, which take 256 MiB."""
    if not isinstance(known, list) or len(known) != 3 or not all(type(size) is int and size > 0 for size in known):
        raise ArtifactError(f"{where}: does not say the size of its images; make it again")
    if math.prod(known) > 2**26:
        raise ArtifactError(f"{where}: images of {known} values are larger than any that are read; make it again")
    return known[0], known[1], known[2]


def pick_device(name: str) -> torch.device:
    """The device of this name; auto takes the GPU where there is one. Raises ConfigError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; use cpu, cuda, cuda:N or auto") from None
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(f"device {name!r} is not on this machine; use cpu or auto")
    check_device(device)
    return device
