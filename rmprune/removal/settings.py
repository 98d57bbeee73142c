"""How residuals are to be removed, refused where it says nothing. Names of blocks are looked up where the blocks are found."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rmprune.errors import ConfigError
from rmprune.graph.fuse import RULES
from rmprune.removal.forms import FORMS

RANGES = ("provable", "calibrated")


@dataclass(frozen=True)
class RemovalSettings:
    """What `rmprune.remove_residuals` is told, by the same names. Raises ConfigError for a bad one."""

    keep: Iterable[str] | None = ()
    ranges: str = "provable"
    form: str = "auto"
    batch_norm: bool = True
    fuse: str = "cheaper"
    tolerance: float = 1e-10
    margin: float = 0.5
    input_range: tuple[float, float] = (-math.inf, math.inf)
    fused: Iterable[str] | None = ()

    def __post_init__(self) -> None:
        for name, known in (("ranges", RANGES), ("form", FORMS), ("fuse", RULES)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name}={value!r} is none of {', '.join(known)}")
        limits = self.input_range
        if not (isinstance(limits, tuple | list) and len(limits) == 2):
            raise ConfigError(f"input_range={limits!r}: give (lowest, highest)")
        numbers = {
            "tolerance": self.tolerance,
            "margin": self.margin,
            "the first of input_range": limits[0],
            "the last": limits[1],
        }
        if found := next((name for name, number in numbers.items() if not hasattr(number, "__float__")), ""):
            raise ConfigError(f"{found} is {numbers[found]!r}, no number")
        if not 0 <= self.margin < math.inf:
            raise ConfigError(
                f"margin={self.margin} must be finite, and not negative: bounds that were seen are widened by it"
            )
        if not self.tolerance > 0:
            raise ConfigError(f"tolerance={self.tolerance} must be positive")
        if not limits[0] < limits[1]:
            raise ConfigError(f"input_range={tuple(limits)} is empty: give (lowest, highest)")
