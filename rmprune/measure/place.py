"""Budgets in measured time: where time counts, and the one search for the largest network within one. Prunes nothing itself.

Time is a staircase in the widths, so nothing is believed here that was not measured: the networks that cuts of several sizes would give
are built and measured, in turns with the original, where the time shall count (the first backend, thread number and batch size of the
settings).
"""

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from rmprune.config import MeasureConfig
from rmprune.errors import InfeasibleBudget, rounded
from rmprune.measure.latency import Configuration, measure_at
from rmprune.measure.latency_model import LatencyModel

logger = logging.getLogger("rmprune")
CANDIDATES = 3  # networks measured in a round
SECONDS = 0.5  # for which each is measured, at most: a winner is measured again, and for as long as the settings say in the end
ATTEMPTS = 3  # measurements before a network counts as too slow
STEP = 1.02  # times: sizes nearer to each other are not told apart
ROUNDS = 6  # of measuring ever nearer to the budget, at most
POWERS = (1.0, 1.4, 1.8)  # of the budget: what fits it costs one of these, or thereabouts
LEAST_GROWTH = 0.1  # of time with size, as a power: below it two measurements say nothing of a third
MARGIN = 0.985  # searches aim so far below the budget: noise must not break it when the trained network is measured
NEAR = 0.96  # of the budget: what takes as much as this is near enough


@dataclass(frozen=True)
class Place:
    """Where time counts: one runtime configuration, and the original network that it is relative to."""

    original: nn.Module
    example: Tensor
    configuration: Configuration
    seconds: float
    min_rounds: int

    @classmethod
    def first(cls, config: MeasureConfig, original: nn.Module, example: Tensor) -> "Place":
        """The first configuration of the settings; `example` is [1, C, H, W]."""
        where = Configuration(config.backends[0], config.device, config.threads[0], config.batch_sizes[0])
        return cls(original, example, where, min(config.seconds, SECONDS), config.min_rounds)

    def __str__(self) -> str:
        return str(self.configuration)

    def layer_times(self, cache: Path | None) -> LatencyModel:
        """The table of times of layers there, kept in this file."""
        backend, device, threads, batch_size = self.configuration
        return LatencyModel(backend, threads=threads, batch_size=batch_size, device=device, cache=cache)

    def ratios(self, networks: Mapping[str, nn.Module]) -> dict[str, float]:
        """Time of each network relative to the original's: the median of paired ratios, all measured in turns."""
        times = measure_at(
            self.configuration, {"original": self.original, **networks}, self.example, seconds=self.seconds, min_rounds=self.min_rounds,
            reference="original", sittings=1, warn=False,  # a step of a search, which nobody can repeat
        )  # fmt: skip
        return {name: float(times[name].ratio or 1.0) for name in networks}

    def ratio(self, network: nn.Module) -> float:
        """Time of one network relative to the original's."""
        return self.ratios({"network": network})["network"]

    def least_ratio(self, network: nn.Module, limit: float) -> float:
        """The same, the least of up to ATTEMPTS measurements while it is over `limit`: no network is judged by one disturbed one."""
        return _least(lambda: self.ratio(network), limit)


def _least(measure: Callable[[], float], limit: float) -> float:
    """The least of up to ATTEMPTS measurements, no more than it takes to come below the limit."""
    least = math.inf
    for _ in range(ATTEMPTS):
        if (least := min(least, measure())) <= limit:
            break
    return least


C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True)
class Found(Generic[C]):
    """What a search ended with, and its network's time relative to the original's; so many different networks were measured."""

    candidate: C
    ratio: float
    networks: int


def largest_within(
    allowed: float,
    at: Callable[[float], C | None],
    size: Callable[[C], float],
    measure: Callable[[Sequence[C]], Iterable[float]],
    low: float,
    high: float,
    *,
    first: Sequence[C] = (),
    near: float = NEAR,
    refuse: Callable[[float], InfeasibleBudget],
) -> Found[C]:
    """The largest candidate whose network was measured, twice, within `allowed` of the original's time.

    `at(s)`: the candidate of size s, between `low` and `high` (None: there is none); two that are equal are one network. `size`: of a
    candidate, in the same unit; time grows with it on the whole, not step by step. `measure`: times of several, relative to the
    original's, in turns. `first`: what to begin with, in the place of sizes spread over the whole range.

    Several sizes are measured at a time, around where a power law through the nearest ones meets the budget with something in hand
    (MARGIN), until one comes near it (takes `near` of the budget) or no other is left. It is measured once more: one that was lucky
    counts as too slow from then on. The smallest needs nothing in hand, and is judged by the best of several measurements. Raises
    `refuse(its time)` where that is over the budget.
    """
    tried: dict[C, float] = {}

    def fitting() -> C | None:
        return max((c for c, ratio in tried.items() if ratio <= MARGIN * allowed), key=size, default=None)

    def confirmed(enough: float) -> Found[C] | None:
        while (best := fitting()) is not None and tried[best] >= enough:
            (tried[best],) = measure([best])
            if tried[best] <= allowed:
                return Found(best, tried[best], len(tried))
        return None

    def spread() -> list[float]:
        return [low * (high / low) ** (step / (CANDIDATES - 1)) for step in range(CANDIDATES)]

    def around() -> list[float]:
        """Where the time should be as wanted, and half way from there to what is known; the smallest, until something fits."""
        aim = _where(sorted((size(c), ratio) for c, ratio in tried.items()), math.sqrt(near * MARGIN) * allowed)
        if aim is None:
            return []
        aim = min(max(aim, low), high)
        return [low if fitting() is None else math.sqrt(low * aim), aim, math.sqrt(aim * high)]

    def ahead() -> list[C]:
        """Candidates not tried yet, around the expected one, else spread from `low` to `high`; sizes too small to be had move `low` up."""
        nonlocal low
        if new := untried([at(s) for s in around()]):
            return new
        while True:
            sizes = spread()
            offers = [at(s) for s in sizes]
            new = untried(offers)
            missing = list(itertools.takewhile(lambda offer: offer[1] is None, zip(sizes, offers, strict=True)))
            if new or len(missing) in (0, CANDIDATES) or missing[-1][0] <= STEP * low:
                return new
            low = missing[-1][0]

    def untried(offers: Iterable[C | None]) -> list[C]:
        return [c for c in dict.fromkeys(offers) if c is not None and c not in tried]

    for turn in range(ROUNDS):
        new = list(dict.fromkeys(first)) if turn == 0 and first else ahead()
        if not new:
            break
        tried.update(zip(new, measure(new), strict=True))
        if (found := confirmed(near * allowed)) is not None:
            return found
        if (best := fitting()) is not None:
            low = size(best)
        high = min((size(c) for c, ratio in tried.items() if ratio > MARGIN * allowed and size(c) > low), default=high)
    if (found := confirmed(0.0)) is not None:
        return found
    if not tried:
        raise refuse(1.0)
    smallest = min(tried, key=size)
    least = _least(lambda: next(iter(measure([smallest]))), MARGIN * allowed)
    if least > allowed:
        raise refuse(least)
    return Found(smallest, least, len(tried))


def _where(known: Sequence[tuple[float, float]], aim: float) -> float | None:
    """The size that takes `aim`, by a power law through the two of `known` (size, time), ascending, around it, or nearest to it.

    None where fewer are known, or their sizes are not told apart, or time does not grow between them.
    """
    over = next((i for i, (_, time) in enumerate(known) if time > aim), len(known))
    pair = known[max(0, min(over - 1, len(known) - 2)) :][:2]
    if len(pair) < 2 or pair[1][0] < STEP * pair[0][0]:
        return None
    (small, short), (large, long) = pair
    growth = math.log(long / short) / math.log(large / small)
    return small * (aim / short) ** (1 / growth) if growth > LEAST_GROWTH else None


def find_ratio(
    cut: Callable[[float], nn.Module],
    low: float,
    high: float,
    allowed: float,
    place: Place,
    first: Iterable[float] = (),
    near: float = NEAR,
) -> float:
    """The largest ratio between `low` and `high` whose network, `cut(ratio)`, was measured within `allowed` of the original's time.

    `first`: the ratios to begin with, where something is known (else powers of `allowed`); `near`: see `largest_within`. A cut may
    raise InfeasibleBudget: a pruner that cannot go as far as the limits would let it. Raises it where even the smallest network that
    can be had is too slow.
    """
    networks: dict[float, nn.Module] = {}
    firsts: dict[tuple[torch.Size, ...], float] = {}

    @functools.cache
    def at(ratio: float) -> float | None:
        with contextlib.suppress(InfeasibleBudget):
            network = cut(ratio)
            same = firsts.setdefault(tuple(p.shape for p in network.parameters()), ratio)
            networks.setdefault(same, network)
            return same
        return None

    def measure(ratios: Sequence[float]) -> Iterable[float]:
        return place.ratios({f"{ratio:.6f}": networks[ratio] for ratio in ratios}).values()

    first = list(first) or [allowed**power for power in POWERS]
    begin = [ratio for ratio in map(at, (ratio for ratio in first if low <= ratio <= high)) if ratio is not None]
    found = largest_within(
        allowed, at, float, measure, low, high,
        first=begin, near=near, refuse=lambda least: infeasible(allowed, least, place),
    )  # fmt: skip
    logger.info("latency_ratio %g on %s: a cut to %.3f of the network's own cost", allowed, place, found.candidate)
    return found.candidate


def infeasible(allowed: float, least: float, place: Place) -> InfeasibleBudget:
    """The error of a budget below what the narrowest network takes, `least` of the original's time."""
    least = rounded(least, 3)
    return InfeasibleBudget(
        f"latency_ratio={allowed:g} cannot be met on {place}: the narrowest network that the limits allow takes {least:.3g} "
        f"of the original's time; lower min_channels, min_fraction or round_to, ask for more than {least:.3g}, or count time elsewhere "
        "(the first --measure.backend, --measure.batch-size and --measure.threads)"
    )
