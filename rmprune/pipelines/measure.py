"""`measure`: the networks of finished runs again, all in turns in one process, and their records brought up to date."""

import logging
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from rmprune import artifact
from rmprune.artifact.files import ARCHITECTURE
from rmprune.config import DataConfig, MeasureConfig, RemeasureConfig
from rmprune.config.data import unread_by
from rmprune.config.toml import from_dict
from rmprune.data.given import GIVEN
from rmprune.data.load import Dataset, Load, load_dataset, looked_for
from rmprune.data.splits import Statistics
from rmprune.errors import ArtifactError, ConfigError
from rmprune.measure import Latency, calibration_images, check_available, measure_latencies
from rmprune.measure.backends import reduced
from rmprune.measure.candidate import Candidate
from rmprune.measure.machine import environment
from rmprune.measure.profile import profile_candidates
from rmprune.pipelines.stages import expected_statistics, image_shape, measuring
from rmprune.runs import records
from rmprune.runs.directory import runs_of, tidy
from rmprune.runs.named import refuse_changed

logger = logging.getLogger("rmprune")


def run_measure(config: RemeasureConfig) -> list[Path]:
    """Measure again and replace the `latency` of every network in the records; returns the records' paths.

    A network that several runs share, or hold a copy of (the original of a sweep), is measured once. Ratios are taken to each
    run's own original. Nothing is written before all is measured; a KeyboardInterrupt after that says how many records are. Raises
    ArtifactError for records that cannot be written or whose images differ in size, before anything is measured.
    """
    if config.image_size is not None:
        raise ConfigError("image_size is for ONNX files, of which there is none; networks of runs know theirs")
    paths = records.find_records(list(config.runs))
    if shut := [path for path in paths if not os.access(path.parent, os.W_OK)]:  # said before minutes are measured
        raise ArtifactError(f"{shut[0]}: cannot be written, so nothing is measured; measure a copy of the run")
    for run in runs_of(paths):
        tidy(run)
    found: dict[str, nn.Module] = {}
    labels: dict[Path, str] = {}
    firsts: dict[bytes, str] = {}
    for path in paths:
        for name in records.networks(records.read_record(path)):
            directory = network_directory(path.parent, name)
            # Equal for copies of an artifact: it holds the digest of the weights.
            labels[directory] = label = firsts.setdefault((directory / ARCHITECTURE).read_bytes(), str(directory))
            if label not in found:
                found[label] = artifact.load(directory)
    shapes = {path: example_shape(path) for path in paths}
    if len(set(shapes.values())) > 1:
        raise ArtifactError("these runs take images of different sizes; measure them one data set at a time")
    check_available(config.measure.backends, config.measure.device)
    data = dataset_of(paths, data_dir=config.data_dir) if reduced(config.measure.backends) else None
    images = torch.randn(1, *shapes[paths[0]], generator=torch.Generator().manual_seed(0))
    profiles = (
        profile({name: Candidate(name, net, images) for name, net in found.items()}, config.measure)
        if config.profile
        else {}
    )
    originals = {labels[network_directory(path.parent, "original")] for path in paths}
    latencies = measure_latencies(
        found,
        images,
        **vars(config.measure),
        reference=min(originals) if len(originals) == 1 else None,
        progress=measuring(len(found), config.measure),
        calibration=None if data is None else calibration_images(data.train),
        split=None if data is None else data.test,
    )
    written: list[Path] = []
    try:
        for path in paths:
            written.append(_renew(path, latencies, profiles, labels, config.measure))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(written)} of {len(paths)} records hold the new times, the others are as they were"
        ) from None
    return paths


def profile(candidates: Mapping[str, Candidate], measure: MeasureConfig) -> dict[str, dict[str, Any]]:
    """Where the time of each network goes, as a record holds it. Raises ConfigError where ONNX Runtime is not there."""
    check_available(("onnxruntime",), "cpu")
    place = {"threads": measure.threads[0], "batch_size": measure.batch_sizes[0]}
    logger.info("profiling layer by layer in onnxruntime, up to %g s a network", measure.seconds)
    found = profile_candidates(candidates, **place, seconds=measure.seconds)
    return {name: {"backend": "onnxruntime", **place, "layers": layers} for name, layers in found.items()}


def _renew(
    path: Path,
    latencies: dict[str, list[Latency]],
    profiles: dict[str, dict[str, Any]],
    labels: dict[Path, str],
    measure: MeasureConfig,
) -> Path:
    """Write the new times of its networks into a record, and how long was measured; where, each time says itself. A profile of before
    goes: it may be another machine's.
    """
    record = records.read_record(path)
    for name, network in records.networks(record).items():
        label = labels[network_directory(path.parent, name)]
        own = latencies[label]
        original = latencies[labels[network_directory(path.parent, "original")]]
        network["latency"] = [
            replace(latency.relative_to(base), reference="original").to_dict()
            for latency, base in zip(own, original, strict=True)
        ]
        network.pop("profile", None)
        network |= {"profile": profiles[label]} if label in profiles else {}
    record["environment"] = environment()
    # Its first place stays that in which a budget of time was met.
    if isinstance(record["config"].get("measure"), dict):
        record["config"]["measure"] |= {"seconds": measure.seconds, "min_rounds": measure.min_rounds}
    return records.write_record(path, record)


def network_directory(run: Path, name: str) -> Path:
    """Where a run keeps a network: `original` is called dense/ on disk; dense/ and plain/ may lie one level up, shared by cells. Raises
    ArtifactError where it is not there."""
    folder = "dense" if name == "original" else name
    if not name.isprintable() or Path(folder).name != folder or folder in ("", ".."):
        raise ArtifactError(f"{run}: its record has a network {name[:80]!r}, which names no folder of it; run it again")
    for place in (run / folder, run.parent / folder):
        if (place / ARCHITECTURE).is_file():  # whole or not, which reading it says
            return place
    raise ArtifactError(f"{run}: its network {name!r} is not there (looked for {folder}/); run it again")


def dataset_of(paths: list[Path], load: Load = load_dataset, data_dir: Path | None = None) -> Dataset:
    """The data set that all these runs trained on, for accuracy in number formats below float32; `data_dir`: where it lies now, in the
    place of what the records say. Raises ArtifactError where there are several, or a record does not say which, ConfigError where its
    labels are gone or it has changed.
    """
    settings = {field.name for field in fields(DataConfig)}
    found: list[tuple[DataConfig, Statistics]] = []
    for path in paths:
        config = records.read_record(path)["config"]
        if not isinstance(config.get("data"), dict):
            raise ArtifactError(
                f"{path}: does not say which data set its accuracy is of; measure with backends of float32 only"
            )
        if str(config["data"].get("dataset", "")).startswith(GIVEN):
            raise ArtifactError(
                f"{path}: its images came from loaders of somebody's own, which are in no file; rmprune.slim, with the same "
                "loaders and out=, gives its result back, whose save() deploys it"
            )
        read = settings - unread_by(str(config["data"].get("dataset")))
        data = from_dict(DataConfig, {name: value for name, value in config["data"].items() if name in read})
        data = _where_it_lies(data, data_dir, path)
        statistics = expected_statistics(str(config.get("model")), config.get("weights"))
        found.append((data, statistics))
    same = attrgetter("dataset", "data_dir", "image_size", "crop", "labels", "normalization")
    if len({(same(data), statistics) for data, statistics in found}) > 1:
        raise ArtifactError(
            "these runs are of different data sets; in int8, bfloat16 or float16 measure one data set at a time"
        )
    opened = load(*found[0])
    for path, (data, _) in zip(paths, found, strict=True):
        for run in runs_of(
            [path]
        ):  # other labels may call its classes otherwise; of other photos some may be what it learned from
            refuse_changed(run, SimpleNamespace(data=data), "train on it as it is now", opened.photos)
    return opened


def _where_it_lies(data: DataConfig, data_dir: Path | None, record: Path) -> DataConfig:
    """The settings with this folder, if any, and the CSV of labels that lies in it where theirs is gone. Raises ConfigError where none
    is."""
    data = data if data_dir is None else replace(data, data_dir=data_dir)
    if data.dataset != "imagefolder" or data.labels is None or Path(str(data.labels_file)).is_file():
        return data
    moved = replace(data, labels=Path(data.labels.name))
    if data_dir is None or not Path(str(moved.labels_file)).is_file():
        raise ConfigError(
            f"{record}: its labels, {data.labels}, do not exist{looked_for(data.labels)}; put them into the folder of the images, and give "
            "that with --data-dir"
        )
    return moved


def example_shape(path: Path) -> tuple[int, int, int]:
    """(C, H, W) of the images of a run's data set."""
    return image_shape(records.read_record(path).get("input_shape"), path)
