"""Which channels go, and by what budget."""

from dataclasses import dataclass
from typing import Literal

from rmprune.config.fields import Fractions, Settings, require, require_distinct, require_inside

ImportanceName = Literal["batch_norm", "taylor", "taylor_squared", "magnitude", "activation", "random"]
PlannedChoice = Literal["keep", "remove", "merge", "drop", "fuse"]
"""What method auto may make of a residual block (see `rmprune.pruning.plan`)."""
OF_PLANS = ("importance", "reconstruct")
"""Settings of pruning that a plan leaves open."""
BUDGETS = ("ratio", "macs_ratio", "latency_ratio", "memory_ratio")
"""Kinds of budget; the last may stand beside one of the others."""


@dataclass(frozen=True)
class PruneConfig(Settings):
    """Which channels go, by what budgets (one of ratio, macs_ratio, latency_ratio; memory_ratio alone or beside), at once or slowly."""

    ratio: Fractions = ()
    """Fraction of the channels of the network being pruned that is removed; several, comma-separated, make a run each."""
    macs_ratio: Fractions = ()
    """Fraction of the original model's MACs that stays; several, comma-separated, make a run each."""
    latency_ratio: Fractions = ()
    """Fraction of the original model's measured time that stays; several, comma-separated, make a run each."""
    memory_ratio: Fractions = ()
    """Fraction of the original model's peak activation memory (one image, as a runtime plans it) that stays; several make a run each.
    One may stand beside a budget of another kind: both hold."""
    importance: ImportanceName = "taylor"
    """What channels are ranked by. Cuts while training always use taylor, from the gradients at hand."""
    rank: Literal["per_cost", "importance"] = "per_cost"
    """per_cost: importance per MAC (or millisecond) saved; importance: one global threshold, as in network slimming."""
    cost: Literal["macs", "time"] = "macs"
    """What channels cost under a latency_ratio: MACs, or milliseconds from a table of layers measured one by one."""
    min_channels: int = 1
    """Channels that every layer keeps at least."""
    min_fraction: float | None = None
    """Fraction of its channels that every layer keeps at least (default: half of what an even cut would leave, or less where needed)."""
    max_fraction: float = 1.0
    """Fraction of its channels that every layer keeps at most."""
    round_to: int = 8
    """Widths are multiples of this: the kernels of CPU runtimes work in blocks of 8 and 16 channels."""
    gradual: bool = False
    """Cut in small steps while training, instead of once before fine-tuning."""
    reconstruct: bool = True
    """After one cut, fit every layer to what it put out before, by least squares on training images."""
    cuts: int = 30
    """How many small cuts (--gradual)."""
    cut_fraction: float = 0.5
    """Part of the fine-tuning over which the cuts are spread; what follows is fine-tuning alone."""
    score_decay: float = 0.5
    """Share of the old scores that survives a cut; 0 ranks by the steps since the last cut alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = dict.fromkeys(name for name, _ in self.budgets)
        unset = " or ".join(f"--{name.replace('_', '-')} none" for name in kinds)
        require(
            len(kinds) <= 1,
            f"{' and '.join(kinds)} are set; give one kind of budget, beside which memory_ratio alone can hold ({unset} takes away what a "
            "config file sets)",
        )
        beside = {*kinds} != {"memory_ratio"} and len(self.memory_ratio) > 1
        require(not beside, f"memory_ratio has {len(self.memory_ratio)} values; beside {', '.join(kinds)} give one")
        for name, value in [*self.budgets, *(("memory_ratio", value) for value in self.memory_ratio)]:
            require(0 < value < 1, f"{name} is {value}; it must lie between 0 and 1, both excluded")
        require_distinct(", ".join(kinds), [value for _, value in self.budgets])
        require_inside(self, "[1, inf)", "min_channels", "round_to", "cuts")
        require_inside(self, "(0, 1]", "cut_fraction")
        require_inside(self, "[0, 1)", "score_decay")
        require(
            0 <= (self.min_fraction or 0.0) <= self.max_fraction <= 1,
            f"min_fraction is {self.min_fraction} and max_fraction {self.max_fraction}; use 0 <= min <= max <= 1",
        )

    @property
    def budgets(self) -> list[tuple[str, float]]:
        """(name, value) of every budget that makes a run, in the order given."""
        found = [(name, value) for name in BUDGETS for value in getattr(self, name)]
        return [budget for budget in found if budget[0] != "memory_ratio"] or found

    @property
    def memory_beside(self) -> float | None:
        """The memory_ratio that holds beside budgets of another kind."""
        return next((value for value in self.memory_ratio if self.budgets[0][0] != "memory_ratio"), None)

    @property
    def usual_method(self) -> str:
        """The method of `slim` where none is named: `auto` for budgets that it can look under, cutting once and fitting what is left."""
        equal = bool(self.macs_ratio or self.latency_ratio)  # networks of equal cost, which it chooses among
        return "auto" if equal and self.reconstruct and not self.gradual else "rm"
