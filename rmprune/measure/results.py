"""What measuring gives: the times of one network under one configuration, and the ratio to another's. No runtimes here."""

import logging
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

logger = logging.getLogger("rmprune.measure")
RESAMPLES = 2000
BUSY = 0.15  # an idle machine's middle half of times lies within a few per cent of the median


@dataclass(frozen=True)
class Latency:
    """Time of one network under one configuration, for a whole batch, in milliseconds; `ratio` is time over the
    reference's.
    """

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
    """95 % bootstrap interval of the median ratio, over paired rounds."""
    number_format: str = "float32"
    first_ms: float | None = None
    """From the file that is deployed to the first output: loading, compiling and one run."""
    peak_mib: float | None = None
    """GPU memory that a run takes beside the weights, where PyTorch allocates it."""
    accuracy: float | None = None
    """Of this number format, measured, from 0 to 1; None where it is float32's."""

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

    def relative_to(self, other: "Latency") -> "Latency":
        """The same with the ratio to `other`, round by round; both must come from one call of measure_latencies."""
        ratios = [own / base for own, base in zip(self.times_ms, other.times_ms, strict=True)]
        q1, ratio, q3 = quartiles(ratios)
        low, high = median_interval(ratios)
        return replace(self, ratio=ratio, ratio_q1=q1, ratio_q3=q3, ratio_low=low, ratio_high=high)

    def to_dict(self) -> dict[str, Any]:
        """As a record holds it; what does not apply is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "times_ms"}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def median_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median by the percentile bootstrap (Efron 1979), the same for the same values and seed."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(np.asarray(values)[drawn], axis=1), [0.025, 0.975])
    return float(low), float(high)


def warn_if_busy(results: Mapping[str, list[Latency]]) -> None:
    """Says in the log where times spread so widely that something else must have run."""
    times = [(latency.spread, name, latency) for name, latencies in results.items() for latency in latencies]
    busy = [time for time in times if time[0] > BUSY]
    if busy:
        spread, name, worst = max(busy, key=lambda time: time[0])
        logger.warning(
            "the machine was busy: %d of %d times spread widely (worst: half of those of %s on %s, batch %d, over %.0f %% of the "
            "median); measure again when it is quiet",
            *(len(busy), len(times), name, worst.backend, worst.batch_size, 100 * spread),
        )
