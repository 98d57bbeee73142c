"""`measure FILE.onnx ...`: files side by side, each as it stands, in turns in one process. No records: a file says nothing of a run."""

import itertools
import math
from dataclasses import replace

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rmprune.config import MeasureConfig, RemeasureConfig
from rmprune.errors import ConfigError
from rmprune.measure import Latency
from rmprune.measure.backends import BACKENDS
from rmprune.measure.candidate import FileCandidate, onnx_form
from rmprune.measure.latency import Configuration, measure_candidates
from rmprune.measure.runtimes import openvino_form
from rmprune.onnx.file import OnnxFile, is_onnx, open_onnx
from rmprune.onnx.layout import channel_axis
from rmprune.pipelines.measure import profile
from rmprune.pipelines.stages import measuring
from rmprune.report.screen import headed, profile_table
from rmprune.report.tables import milliseconds

_SIZE = 224  # of images whose size no file says
FILE_BACKENDS = tuple(name for name, backend in BACKENDS.items() if backend.form in (onnx_form, openvino_form))


def run_measure_files(config: RemeasureConfig) -> dict[str, list[Latency]]:
    """Measure ONNX files in turns and print their times and the ratios to the first one's; returns the times by file.

    Raises ConfigError for runs among them, settings of runs, backends that read no files, and files that take different images or batches.
    """
    if not all(is_onnx(path) for path in config.runs):
        raise ConfigError("measure takes runs or ONNX files, not both at once; measure them one after the other")
    if config.data_dir is not None:
        raise ConfigError("data_dir is where the images of runs lie, and ONNX files have none; leave it out")
    names = [str(path) for path in config.runs]
    if len(set(names)) < len(names):
        raise ConfigError("a file is named twice; name each once")
    files = {str(path): open_onnx(path) for path in config.runs}
    measure = config.measure
    if measure.backends == MeasureConfig().backends:
        measure = replace(measure, backends=("onnxruntime",))
    unfit = [name for name in measure.backends if name in BACKENDS and name not in FILE_BACKENDS]
    if unfit:
        raise ConfigError(f"backend {unfit[0]!r} reads no ONNX files; those that do are {', '.join(FILE_BACKENDS)}")
    shapes = _example_shapes(list(files.values()), config.image_size)
    measure = replace(measure, batch_sizes=_batch_sizes(files, measure))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, *shape, generator=generator) for shape in shapes]
    candidates = {
        name: FileCandidate(name, file, tuple(x.to(entry.dtype) for x, entry in zip(inputs, file.inputs, strict=True)))
        for name, file in files.items()
    }
    profiles = profile(candidates, measure) if config.profile else {}
    found = measure_candidates(candidates, **vars(measure), reference=names[0], progress=measuring(len(files), measure))
    console = Console()
    for table in (*times_tables(found), *itertools.starmap(profile_table, profiles.items())):
        console.print(table)
    return found


def _example_shapes(files: list[OnnxFile], image_size: int | None) -> list[tuple[int, ...]]:
    """The sizes of one example of each input, in which all files agree; what all leave open is `image_size`, or 224."""
    first, found = files[0], []
    if len({len(file.inputs) for file in files}) > 1:
        raise ConfigError("these files take different numbers of inputs; measure them apart")
    for i, entry in enumerate(first.inputs):
        sizes = [file.inputs[i].sizes for file in files]
        said = [{given[axis] for given in sizes if len(given) > axis} - {None} for axis in range(1, len(entry.sizes))]
        if len({len(given) for given in sizes}) > 1 or any(len(values) > 1 for values in said):
            raise ConfigError(
                f"{first.path} takes inputs of sizes {entry.sizes}, another file others; measure them apart"
            )
        at = channel_axis(first, entry) - 1
        free = [3 if axis == at and len(said) > 1 else image_size or _SIZE for axis in range(len(said))]
        found.append(
            tuple(next(iter(values)) or 0 if values else size for values, size in zip(said, free, strict=True))
        )
        pixels = [(values, n) for axis, (values, n) in enumerate(zip(said, found[-1], strict=True)) if axis != at]
        if image_size is not None and any(values and n != image_size for values, n in pixels):
            raise ConfigError(
                f"{first.path} takes images of {tuple(n for _, n in pixels)} pixels, not of {image_size}; leave out --image-size"
            )
        if math.prod(found[-1]) > 2**24:
            raise ConfigError(f"{first.path}: inputs of sizes {found[-1]} are too large to measure")
    return found


def _batch_sizes(files: dict[str, OnnxFile], measure: MeasureConfig) -> tuple[int, ...]:
    """Those asked for; where a file says its number of images, that one alone."""
    fixed = {entry.sizes[0]: name for name, file in files.items() for entry in file.inputs if entry.sizes[0]}
    if not fixed:
        return measure.batch_sizes
    if (measure.batch_sizes != MeasureConfig().batch_sizes and set(measure.batch_sizes) != set(fixed)) or len(
        fixed
    ) > 1:
        said = ", ".join(f"{name} takes batches of {size}" for size, name in fixed.items())
        raise ConfigError(f"{said}, which --batch-size cannot change; measure with that one, and files of others apart")
    return tuple(size for size in fixed if size is not None)


def times_tables(found: dict[str, list[Latency]]) -> list[Table]:
    """A table for each configuration: median and quartiles of each file, and the ratio to the first one with its 95 % interval."""
    tables = []
    for times in zip(*found.values(), strict=True):
        one = times[0]
        title = f"{Configuration(one.backend, one.device, one.threads, one.batch_size)}: ms for a batch"
        table = headed(title, "file", "median", "quartiles", "ratio", "95 %", fold=True)
        for name, time in zip(found, times, strict=True):
            quartiles = f"{milliseconds(time.q1_ms)} to {milliseconds(time.q3_ms)}"
            interval = f"{time.ratio_low:.2f} to {time.ratio_high:.2f}"
            table.add_row(escape(name), milliseconds(time.median_ms), quartiles, f"{time.ratio:.2f}x", interval)
        tables.append(table)
    return tables
