"""Whether this machine is quiet enough to time on: one network against its own copy, and the spread of its times."""

import os
from dataclasses import dataclass

import torch
from torch import nn

from rmprune.measure.latency import Configuration, measure_at
from rmprune.measure.results import BUSY

STEADY = 0.05


@dataclass(frozen=True)
class Quietness:
    """`spread`: the middle half of the times over their median; `ratio`: time of a network over its own copy's, with its 95 % interval."""

    spread: float
    ratio: float
    ratio_low: float
    ratio_high: float
    load: float | None
    """Processes that wanted a core in the last minute, on average; None where the system does not say."""

    @property
    def verdict(self) -> str:
        """quiet, restless or busy, by the spread of the times and by how far from 1 the ratio may be."""
        doubt = max(self.spread, 1 - self.ratio_low, self.ratio_high - 1)
        return "quiet" if doubt <= STEADY else "restless" if doubt <= BUSY else "busy"

    def __str__(self) -> str:
        advice = {
            "quiet": "quiet: fit to measure on",
            "restless": "restless: no small difference will show",
            "busy": "busy: end other work before measuring",
        }
        load = "" if self.load is None else f"; load {self.load:.1f}"
        return (
            f"{advice[self.verdict]} (half of the times lie within {100 * self.spread:.1f} % of their median; a network against its own "
            f"copy {self.ratio:.3f}, {self.ratio_low:.3f} to {self.ratio_high:.3f}{load})"
        )


def quietness(seconds: float = 2.0) -> Quietness:
    """Measures a small network in turns with its copy, eager on the CPU, for about `seconds`."""
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"seconds": seconds / 2, "min_rounds": 9, "reference": "copy", "sittings": 1, "warn": False}
    found = measure_at(Configuration("eager", "cpu", 1, 1), {"net": net, "copy": net}, x, **settings)["net"]
    ratio, low, high = (float(value or 1.0) for value in (found.ratio, found.ratio_low, found.ratio_high))
    return Quietness(found.spread, ratio, low, high, os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
