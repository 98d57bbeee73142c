"""Budgets in measured time: which cut meets them. Prunes for widths only.

Time is a staircase in the widths, so nothing is believed here that was not measured: the networks that cuts of several sizes would give
are built and measured, in turns with the original, where the time shall count (the first backend, thread number and batch size of the
settings).
"""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmprune.config import MeasureConfig
from rmprune.errors import InfeasibleBudget
from rmprune.measure import measure_latencies

logger = logging.getLogger("rmprune")
CANDIDATES = 5  # networks measured in a round
ATTEMPTS = 3  # measurements before a network counts as too slow
ROUNDS = 3  # of measuring ever nearer to the budget: steps of up to 2.1 times, then 1.2, then 1.05
MARGIN = (
    0.985  # cuts aim this much below the budget, so that noise does not break it when the trained network is measured
)


@dataclass(frozen=True)
class Place:
    """Where time counts: one runtime configuration, and the original network that it is relative to."""

    original: nn.Module
    example: Tensor
    backend: str
    threads: int
    batch_size: int
    device: str
    seconds: float
    min_rounds: int

    @classmethod
    def first(cls, config: MeasureConfig, original: nn.Module, example: Tensor) -> "Place":
        """The first configuration of the settings; `example` is [1, C, H, W]."""
        settings = (config.backends[0], config.threads[0], config.batch_sizes[0], config.device)
        return cls(original, example, *settings, config.seconds, config.min_rounds)

    def __str__(self) -> str:
        return f"{self.backend}, {self.threads} threads, batch {self.batch_size}"

    def ratios(self, networks: Mapping[str, nn.Module]) -> dict[str, float]:
        """Time of each network relative to the original's: the median of paired ratios, all measured in turns."""
        latencies = measure_latencies(
            {"original": self.original, **networks},
            self.example,
            backends=[self.backend],
            threads=[self.threads],
            batch_sizes=[self.batch_size],
            device=self.device,
            seconds=self.seconds,
            min_rounds=self.min_rounds,
            reference="original",
        )
        return {name: float(latencies[name][0].ratio or 1.0) for name in networks}

    def ratio(self, network: nn.Module) -> float:
        """Time of one network relative to the original's."""
        return self.ratios({"network": network})["network"]

    def least_ratio(self, network: nn.Module, limit: float) -> float:
        """The same, the least of up to ATTEMPTS measurements while it is over `limit`: no network is judged by one disturbed one."""
        least = math.inf
        for _ in range(ATTEMPTS):
            least = min(least, self.ratio(network))
            if least <= limit:
                break
        return least


def find_ratio(cut: Callable[[float], nn.Module], low: float, high: float, allowed: float, place: Place) -> float:
    """The largest ratio between `low` and `high` whose network, `cut(ratio)`, was measured within `allowed` of the original's time.

    Raises InfeasibleBudget where even `cut(low)` is too slow.
    """
    best: float | None = None
    for _ in range(ROUNDS):
        grid = [low * (high / low) ** step for step in torch.linspace(0, 1, CANDIDATES).tolist()]
        networks: dict[str, nn.Module] = {}
        for r in grid:
            with contextlib.suppress(InfeasibleBudget):  # a pruner that cannot go as far as the limits would let it
                networks[f"{r:.4f}"] = cut(r)
        measured = place.ratios(networks)
        fitting = [r for r in grid if measured.get(f"{r:.4f}", math.inf) <= MARGIN * allowed]
        if not fitting and best is None:
            least = min((r for r in grid if f"{r:.4f}" in networks), default=high)
            narrowest = networks.get(f"{least:.4f}")
            took = 1.0 if narrowest is None else place.least_ratio(narrowest, MARGIN * allowed)
            if took > allowed:  # within it there is nothing narrower to be had, with or without something in hand
                raise infeasible(allowed, took, place)
            fitting = [least]
        best = max(fitting, default=best)
        assert best is not None
        low, high = best, min((r for r in grid if r > best), default=high)
    assert best is not None
    logger.info("latency_ratio %g on %s: a cut to %.3f of the network's own cost", allowed, place, best)
    return best


def infeasible(allowed: float, least: float, place: Place) -> InfeasibleBudget:
    """The error of a budget below what the narrowest network takes, `least` of the original's time."""
    return InfeasibleBudget(
        f"latency_ratio={allowed:g} cannot be met on {place}: the narrowest network that the limits allow takes {least:.2f} "
        f"of the original's time; lower min_channels, min_fraction or round_to, ask for more than {least:.2f}, or count time elsewhere "
        "(the first --measure.backend, --measure.batch-size and --measure.threads)"
    )
