"""Budgets in measured time: which budget in MACs meets them, and whether the finished network does. Prunes for widths only.

Time is a staircase in the widths, so nothing is predicted here: networks of the widths that a budget in MACs would give are built and
measured, in turns with the original, where the time shall count (the first backend, thread number and batch size of the settings).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rmprune.config import MeasureConfig
from rmprune.errors import InfeasibleBudget
from rmprune.measure import measure_latencies
from rmprune.pruning import Budget, allocate, shrink
from rmprune.pruning.budget import least_cost
from rmprune.pruning.structure import Structure, macs, total_cost

logger = logging.getLogger("rmprune")
CANDIDATES = 6  # networks measured in a round
ROUNDS = 2  # of measuring ever nearer to the budget


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


def in_macs(structure: Structure, budget: Budget, ratio: float, floor: float | None) -> Budget:
    """`budget`, in measured time, as one in MACs. `floor`: where not None, min_fraction is this part of what an even cut leaves."""
    assert budget.reference_macs
    found = replace(budget, latency_ratio=None, macs_ratio=ratio)
    if floor is None:
        return found
    even = min(1.0, ratio * budget.reference_macs / total_cost(structure, macs)) ** 0.5
    return replace(found, min_fraction=floor * even)


def find_macs_ratio(
    network: nn.Module,
    structure: Structure,
    scores: Mapping[str, Tensor],
    budget: Budget,
    place: Place,
    floor: float | None,
) -> float:
    """The largest macs_ratio whose widths, as `scores` choose them, were measured within `budget.latency_ratio`.

    `floor` is that of `in_macs`. Raises InfeasibleBudget where even the narrowest network that the limits allow is too slow.
    """
    assert budget.latency_ratio is not None and budget.reference_macs
    reference, whole = budget.reference_macs, total_cost(structure, macs)

    low = least_cost(structure, budget, macs) / reference * 1.02
    high = min(whole / reference, 0.999)
    best: float | None = None
    for _ in range(ROUNDS):
        steps = torch.linspace(0, 1, CANDIDATES).tolist()
        grid = [low * (high / low) ** step for step in steps]
        networks = {
            f"{r:.4f}": shrink(network, allocate(structure, scores, in_macs(structure, budget, r, floor)), structure)[0]
            for r in grid
        }
        measured = place.ratios(networks)
        fitting = [r for r in grid if measured[f"{r:.4f}"] <= budget.latency_ratio]
        if not fitting and best is None:
            least = min(measured.values())
            raise InfeasibleBudget(
                f"latency_ratio={budget.latency_ratio:g} cannot be met on {place}: the narrowest network that the limits allow "
                f"takes {least:.2f} of the original's time; lower min_channels or min_fraction, or ask for more than {least:.2f}"
            )
        best = max(fitting, default=best)
        assert best is not None
        low, high = best, min((r for r in grid if r > best), default=high)
    logger.info("latency_ratio %g on %s: macs_ratio %.3f", budget.latency_ratio, place, best)
    assert best is not None
    return best
