"""What measuring gives: the times of one network under one configuration, and the ratio to another's. No runtimes here."""

import itertools
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

logger = logging.getLogger("rmprune.measure")
RESAMPLES = 1000
BUSY = 0.15  # an idle machine's middle half of times lies within a few per cent of the median


@dataclass(frozen=True)
class Latency:
    """Time of one network under one configuration, for a whole batch, in milliseconds; `ratio` is time over the reference's."""

    backend: str
    device: str
    threads: int
    batch_size: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    runs: int
    """Runs counted, over all rounds."""
    rounds: int
    reference: str | None = None
    ratio: float | None = None
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    """95 % bootstrap interval of the median ratio, over sittings and over stretches of paired rounds."""
    number_format: str = "float32"
    first_ms: float | None = None
    """From the file that is deployed to the first output: loading, compiling and one run."""
    peak_mib: float | None = None
    """GPU memory that a run takes beside the weights, where PyTorch allocates it."""
    accuracy: float | None = None
    """Of this number format, measured, from 0 to 1; None where it is float32's."""
    sittings: tuple[int, ...] = ()
    """Rounds of each sitting: candidates are made ready anew for each."""
    disturbed: int = 0
    """Rounds that are left out: other processes had the cores."""

    times_ms: tuple[float, ...] = field(default=(), repr=False, compare=False)
    """Mean time of each round; networks measured together share their rounds."""

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return self.batch_size / self.median_ms * 1e3

    @property
    def spread(self) -> float:
        """The middle half of the times over their median."""
        return (self.q3_ms - self.q1_ms) / self.median_ms

    @property
    def uncertainty(self) -> float:
        """How far apart the ends of the ratio's interval lie, as a part of the lower one; 0 without a ratio."""
        return 0.0 if self.ratio_low is None or self.ratio_high is None else self.ratio_high / self.ratio_low - 1

    def relative_to(self, other: "Latency") -> "Latency":
        """The same with the ratio to `other`, round by round; both must come from one call of measure_latencies."""
        ratios = [own / base for own, base in zip(self.times_ms, other.times_ms, strict=True)]
        q1, ratio, q3 = quartiles(ratios)
        low, high = median_interval(ratios, self.sittings)
        return replace(self, ratio=ratio, ratio_q1=q1, ratio_q3=q3, ratio_low=low, ratio_high=high)

    def followed_by(self, other: "Latency") -> "Latency":
        """Both as one, of the same network and place: the sittings of `other` come after."""
        times = (*self.times_ms, *other.times_ms)
        return replace(
            self,
            **_quartiles_ms(times),
            runs=self.runs + other.runs,
            rounds=len(times),
            sittings=self.sittings + other.sittings,
            disturbed=self.disturbed + other.disturbed,
            times_ms=times,
        )

    def to_dict(self) -> dict[str, Any]:
        """As a record holds it; what does not apply is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "times_ms"}


def of_rounds(times_ms: Sequence[float], repeats: int, disturbed: int, **facts: Any) -> Latency:
    """One sitting, from the mean time of each round of so many runs; `facts`: where, and what else is known."""
    return Latency(
        **_quartiles_ms(times_ms),
        runs=repeats * len(times_ms),
        rounds=len(times_ms),
        sittings=(len(times_ms),),
        disturbed=disturbed,
        times_ms=tuple(times_ms),
        **facts,
    )


def _quartiles_ms(times: Sequence[float]) -> dict[str, Any]:
    return dict(zip(("q1_ms", "median_ms", "q3_ms"), quartiles(times), strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def median_interval(values: Sequence[float], sittings: Sequence[int] = (), seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median by the percentile bootstrap (Efron 1979), the same for the same values and seed.

    Rounds that follow each other are alike, and those of a sitting more so. Sittings of so many rounds (all are one by default) are
    drawn with replacement, and in each of them stretches of rounds (circular block bootstrap, Politis and Romano 1992), as long as the
    square root of their number. A sitting drawn gives as many rounds as it has: long ones weigh more, as they do in the median itself.
    """
    sizes = sittings or (len(values),)
    random = np.random.default_rng(seed)
    sitting = random.integers(len(sizes), size=(RESAMPLES, len(sizes)))
    drawn = np.full((*sitting.shape, max(sizes)), np.inf)  # sorted behind all rounds of shorter sittings
    for number, (size, end) in enumerate(zip(sizes, itertools.accumulate(sizes), strict=True)):
        block, here = max(1, round(size**0.5)), sitting == number
        starts = random.integers(size, size=(here.sum(), -(-size // block), 1))
        rounds = ((starts + np.arange(block)) % size).reshape(len(starts), -1)[:, :size]
        drawn[here, :size] = np.asarray(values[end - size : end])[rounds]
    ordered, count = np.sort(drawn.reshape(RESAMPLES, -1)), np.array(sizes)[sitting].sum(axis=1)
    middle = np.stack([(count - 1) // 2, count // 2], axis=1)
    medians = np.take_along_axis(ordered, middle, axis=1).mean(axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def warn_if_doubtful(results: Mapping[str, list[Latency]], known: float) -> None:
    """Says in the log where times spread so widely that something else must have run, and where a ratio is not `known` so closely."""
    times = [(latency.spread, name, latency) for name, latencies in results.items() for latency in latencies]
    busy = [time for time in times if time[0] > BUSY]
    if busy:
        spread, name, worst = max(busy, key=lambda time: time[0])
        logger.warning(
            "the machine was busy: %d of %d times spread widely (worst: half of those of %s on %s, batch %d, over %.0f %% of the "
            "median); measure again when it is quiet",
            *(len(busy), len(times), name, worst.backend, worst.batch_size, 100 * spread),
        )
    doubtful = [(one.uncertainty, name, one) for _, name, one in times if one.uncertainty > known]
    if doubtful:
        _, name, worst = max(doubtful, key=lambda time: time[0])
        logger.warning(
            "%d of %d ratios are not known within %.0f %% (worst: %s on %s, %d thread(s), batch %d: %.3f to %.3f)%s",
            *(len(doubtful), len(times), 100 * known, name, worst.backend, worst.threads, worst.batch_size),
            *(worst.ratio_low, worst.ratio_high),
            "; on one thread they are steadier" if worst.threads > 1 else "",
        )
