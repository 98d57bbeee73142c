"""Measured time of networks, fairly: all candidates in one process, in turns, under the same threads and batch. No cost
models here.

How: batch norms folded, eval mode, inference mode, the number format of the backend, static batch size. For each
configuration (backend, threads, batch size) all candidates are made ready and warmed up until they get no faster; then come
rounds. In a round each candidate has one turn, in an order shuffled anew. A turn is as many runs as fill about 5 ms that are not
counted (they bring back caches that the candidates before have taken, and outlast threads that still spin) and then as many that are,
whose mean is the turn's time. Rounds in which other processes had the cores are left out and made up for. Rounds go on until the
time budget is spent, and there are at least `min_rounds`.

A comparison is made in several sittings, each with all candidates made ready anew: where weights and activations come to lie moves a
time by a per cent or two for as long as they lie there, and a machine may change its mind between one minute and the next. Every
configuration has its first sitting before any has its second. Where a ratio is then not yet known within KNOWN, as many more follow.

Reported: median and quartiles over rounds, the ratio to the reference candidate round by round with a bootstrap interval over
sittings and rounds (the better comparison: a machine that slows down for a while slows both), and apart from these the time to
the first output.
"""

import itertools
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmprune.config import MeasureConfig
from rmprune.config.fields import require_types
from rmprune.data.splits import Split
from rmprune.errors import ConfigError
from rmprune.graph.foreign import plain_module
from rmprune.graph.inputs import Inputs, as_names, as_tuple
from rmprune.measure.accuracy import candidate_accuracy
from rmprune.measure.backends import (
    BACKENDS,
    check_backend,
    needs_calibration,
    prepare,
    reduced,
    says_what_fails,
    surroundings,
)
from rmprune.measure.candidate import Candidate, Run
from rmprune.measure.results import Latency, of_rounds, warn_if_doubtful
from rmprune.measure.rounds import quiet_process, timed_rounds

logger = logging.getLogger("rmprune.measure")
SITTINGS = 5
SITTING_SECONDS = 0.2  # at least
KNOWN = 0.03  # a ratio whose interval is no wider than this


class Configuration(NamedTuple):
    """Where and how time is measured; `device` is cpu, cuda or cuda:N."""

    backend: str
    device: str
    threads: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.backend}, {self.threads} thread{'s' * (self.threads > 1)}, batch {self.batch_size}"


def measure_latency(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    backend: str = "onnxruntime",
    threads: int = 1,
    batch_size: int | None = None,
    device: str = "cpu",
    seconds: float = 2.0,
    min_rounds: int = 15,
) -> Latency:
    """Time of one network: `example_inputs` (N, C, H, W), or several inputs (eager and onnxruntime); `batch_size` defaults to N.
    To compare networks, use measure_latencies.

    >>> net, x = nn.Conv2d(3, 8, 3), torch.randn(4, 3, 16, 16)
    >>> time = rmprune.measure_latency(net, x, backend="eager", threads=1, seconds=0.0, min_rounds=5)
    >>> time.batch_size, time.rounds, 0 < time.q1_ms <= time.median_ms <= time.q3_ms
    (4, 5, True)
    """
    model = plain_module(model)
    batch_size = len(as_tuple(model, example_inputs)[0]) if batch_size is None else batch_size
    place = Configuration(backend, device, threads, batch_size)
    return measure_at(place, {"model": model}, example_inputs, seconds=seconds, min_rounds=min_rounds)["model"]


def measure_at(
    place: Configuration, models: dict[str, nn.Module], example_inputs: Inputs, **settings: Any
) -> dict[str, Latency]:
    """The time of each network in one place; `settings`: the others of `measure_latencies`."""
    found = measure_latencies(
        models, example_inputs, backends=[place.backend], threads=[place.threads], batch_sizes=[place.batch_size],
        device=place.device, **settings,
    )  # fmt: skip
    return {name: time for name, (time,) in found.items()}


def measure_latencies(
    models: dict[str, nn.Module],
    example_inputs: Inputs,
    *,
    backends: Sequence[str] = ("eager", "onnxruntime"),
    threads: Sequence[int] = (1,),
    batch_sizes: Sequence[int] = (1, 32),
    device: str = "cpu",
    seconds: float = 2.0,
    min_rounds: int = 15,
    reference: str | None = None,
    sittings: int = SITTINGS,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    calibration: Tensor | None = None,
    split: Split | None = None,
    warn: bool = True,
) -> dict[str, list[Latency]]:
    """Times of all `models` under every configuration, interleaved; the module's first lines say how.

    `seconds` is the time budget for each model and configuration (rounds may run over it to reach `min_rounds`).
    `reference` names the model that ratios are taken to. Several models are compared in so many `sittings`, or fewer where these would
    last less than 0.2 seconds a model, and in one on a GPU or by torch.compile, which are slow to make ready. `progress` is told each
    configuration as it starts, in each sitting. `calibration`:
    training images [N, C, H, W], without which int8 is refused. With a `split`, `accuracy` on it is measured in every number format
    but float32. Models are left alone; torch's number of threads and the garbage collector are put back. A spread that says the
    machine was busy is warned of in the log (`warn`). Raises ConfigError for an unknown or missing backend, device or reference,
    UnsupportedModel where torch.fx cannot trace a model.

    >>> nets, x = {"narrow": nn.Conv2d(3, 4, 3), "wide": nn.Conv2d(3, 8, 3)}, torch.randn(1, 3, 16, 16)
    >>> place = {"backends": ["eager"], "threads": [1], "batch_sizes": [1], "seconds": 0.0, "min_rounds": 5}
    >>> found = rmprune.measure_latencies(nets, x, reference="wide", **place)
    >>> found["wide"][0].ratio, found["narrow"][0].median_ms > 0
    (1.0, True)
    """
    backends = as_names(backends, "backends")
    models = {name: plain_module(model) for name, model in models.items()}
    example_inputs = as_tuple(next(iter(models.values())), example_inputs)
    candidates = {name: Candidate(name, model, example_inputs, calibration) for name, model in models.items()}
    if needs_calibration(backends) and calibration is None:
        next(iter(candidates.values())).calibration  # noqa: B018  says what is missing, before anything is timed
    results = measure_candidates(
        candidates, backends=backends, threads=threads, batch_sizes=batch_sizes, device=device, seconds=seconds, min_rounds=min_rounds,
        reference=reference, sittings=sittings, seed=seed, progress=progress, warn=warn,
    )  # fmt: skip
    if split is not None:
        for backend, (name, candidate) in itertools.product(reduced(backends), candidates.items()):
            logger.info("accuracy of %s on %s, %d images", name, backend, len(split))
            accuracy = candidate_accuracy(candidate, split, backend, device=device, threads=max(threads))
            results[name] = [replace(r, accuracy=accuracy) if r.backend == backend else r for r in results[name]]
    return results


def measure_candidates(
    candidates: Mapping[str, Candidate], *, backends: Sequence[str], threads: Sequence[int], batch_sizes: Sequence[int], device: str,
    seconds: float, min_rounds: int, reference: str | None, sittings: int = SITTINGS, seed: int = 0,
    progress: Callable[[str], None] | None = None, warn: bool = True,
) -> dict[str, list[Latency]]:  # fmt: skip
    """`measure_latencies` of what is a candidate already, such as a file: times under every configuration, and ratios to `reference`.
    Raises ConfigError for settings that measure nothing."""
    check_available(backends, device)
    lists = {"threads": tuple(threads), "batch_sizes": tuple(batch_sizes)}
    require_types(MeasureConfig, {**lists, "seconds": seconds, "min_rounds": min_rounds})
    if min([*threads, *batch_sizes, min_rounds], default=0) < 1 or seconds < 0:
        raise ConfigError("threads, batch sizes and rounds must be at least 1, and seconds not negative")
    if reference is not None and reference not in candidates:
        raise ConfigError(f"reference {reference!r} is not among the models measured: {', '.join(candidates)}")
    places = list(itertools.starmap(Configuration, itertools.product(backends, [device], threads, batch_sizes)))
    planned = {place: sittings_of(place, seconds, sittings) if len(candidates) > 1 else 1 for place in places}
    wanted = dict(planned)
    found: dict[Configuration, dict[str, Latency]] = {}
    compared: dict[Configuration, dict[str, Latency]] = {}
    for sitting in range(2 * max(planned.values())):
        for place in (place for place in places if sitting < wanted[place]):
            if progress is not None:
                progress(str(place))
            n = planned[place]
            new = measure_configuration(candidates, place, seconds / n, -(-min_rounds // n), seed + sitting)
            found[place] = {name: one.followed_by(new[name]) for name, one in found[place].items()} if sitting else new
            if sitting + 1 == wanted[place]:
                compared[place] = _compared(found[place], reference)
                if 1 < n == wanted[place] and any(x.uncertainty > KNOWN for x in compared[place].values()):
                    # All are sat: to stop at the first narrow interval would keep those that are narrow by chance.
                    wanted[place] = 2 * n
    results = {name: [compared[place][name] for place in places] for name in candidates}
    if warn:
        warn_if_doubtful(results, KNOWN)
    return results


def _compared(found: dict[str, Latency], reference: str | None) -> dict[str, Latency]:
    if reference is None:
        return found
    return {name: replace(own.relative_to(found[reference]), reference=reference) for name, own in found.items()}


def measure_configuration(
    candidates: Mapping[str, Candidate], configuration: Configuration, seconds: float, min_rounds: int, seed: int
) -> dict[str, Latency]:
    """Times of all candidates under one configuration, interleaved, as `measure_latencies` takes them; without ratios."""
    backend, device, threads, _ = configuration
    runs: dict[str, Run] = {}
    facts: dict[str, dict[str, Any]] = {}
    with quiet_process(threads), surroundings(backend, device), torch.inference_mode():
        for name, candidate in candidates.items():
            prepared = runs[name] = prepare(candidate, *configuration)
            start = time.perf_counter()
            with says_what_fails(name, backend):
                prepared()
            if device != "cpu":
                torch.cuda.synchronize()
            facts[name] = {"first_ms": prepared.load_ms + (time.perf_counter() - start) * 1e3}
            if device != "cpu" and not BACKENDS[backend].packages:
                # A CUDA graph takes what it needs when it is recorded.
                facts[name]["peak_mib"] = _gpu_peak_mib(prepared) or None
        rounds = timed_rounds(runs, device, seconds, min_rounds, random.Random(seed))
    return {
        name: of_rounds(
            times, rounds.repeats[name], rounds.disturbed, **configuration._asdict(),
            number_format=BACKENDS[backend].number_format, **facts[name],
        )
        for name, times in rounds.turns.items()
    }  # fmt: skip


def sittings_of(place: Configuration, seconds: float, most: int = SITTINGS) -> int:
    """In how many a comparison is made there: `most`, unless they would be too short, or candidates are slow to make ready."""
    slow = place.device != "cpu" or place.backend.startswith("compile")
    return 1 if slow else max(1, min(most, int(seconds / SITTING_SECONDS)))


def check_available(backends: Sequence[str], device: str) -> None:
    """Raise ConfigError where a backend is unknown or not installed, or the device is not there; before any training."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ConfigError(f"device {device!r} is not supported; use cpu or cuda (cuda:N)")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r}: there is no CUDA device {index or 0} here; use --device cpu")
    for backend in backends:
        check_backend(backend, device)


def _gpu_peak_mib(run: Run) -> float:
    """What PyTorch's allocator holds at most during one run above what it held before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
