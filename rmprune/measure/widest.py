"""The widest of several networks, or the deepest, that a budget allows: networks that differ in one number."""

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rmprune.errors import InfeasibleBudget, rounded
from rmprune.measure.place import largest_within

STEPS = 40  # widths between 0 and the original's, at most
Ratios = Callable[[Mapping[str, nn.Module]], Mapping[str, float]]
"""{name: network} -> {name: its cost as a fraction of the original's}."""


@dataclass(frozen=True)
class Widest:
    """A width (a multiplier, or channels), and the cost of its network as a fraction of the original's."""

    width: float
    ratio: float


def smaller_widths(make: Callable[[float], nn.Module], own: float, *, whole: bool) -> list[float]:
    """At most STEPS widths up to the original's `own` (`whole`: whole numbers), ascending; of those that rounding makes equal the first."""
    steps = [own * step / STEPS for step in range(1, STEPS + 1)]
    widths = sorted({float(max(1, round(width))) for width in steps}) if whole else steps
    firsts: dict[tuple[int, ...], float] = {}
    for width in widths:
        firsts.setdefault(tuple(p.numel() for p in make(width).parameters()), width)
    return list(firsts.values())


def too_dear(what: str, cost: float, allowed: float) -> InfeasibleBudget:
    """That a network, `what`, costs more than `allowed` times the original; infinite where it is its memory that is too much."""
    over = f"costs {rounded(cost, 3):.3g} times the original, more than {allowed:g}"
    return InfeasibleBudget(f"{what} {over if cost < math.inf else 'takes more memory than memory_ratio allows'}")


def widest(
    what: str, make: Callable[[float], nn.Module], widths: Sequence[float], ratios: Ratios, allowed: float, *,
    timed: bool,
) -> Widest:  # fmt: skip
    """The largest of these widths, ascending, whose network costs at most `allowed` times the original.

    `timed`: it is searched for as all others are (`measure.place.largest_within`): something in hand, and measured twice. Raises
    InfeasibleBudget where even the narrowest, `what`, is too dear.
    """
    network = functools.cache(lambda width: make(width).eval())

    def measure(some: Sequence[float]) -> list[float]:
        return list(ratios({str(width): network(width) for width in some}).values())

    def refuse(least: float) -> InfeasibleBudget:
        return too_dear(what, least, allowed)

    if timed:

        def at(size: float) -> float:
            return min(widths, key=lambda width: abs(width - size))

        found = largest_within(allowed, at, float, measure, widths[0], widths[-1], refuse=refuse)
        return Widest(found.candidate, found.ratio)
    fitting = bisect_right(widths, allowed, key=lambda width: measure([width])[0])
    if not fitting:
        raise refuse(measure(widths[:1])[0])
    return Widest(widths[fitting - 1], measure(widths[fitting - 1 : fitting])[0])
