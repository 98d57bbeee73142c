"""The amc command: the search and the run around it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from tyro.conf import OmitArgPrefixes as Unprefixed

from rmprune.config.fields import Fractions, Names, Settings, require, require_distinct, require_inside
from rmprune.config.pruning import ImportanceName
from rmprune.config.runs import RemovalConfig, RunConfig, require_comparison
from rmprune.config.training import Precision, TrainConfig

Constraint = Literal["macs", "latency", "params"]


@dataclass(frozen=True)
class SearchConfig(Settings):
    """The search for the width of every layer, by an agent (AMC, He et al. 2018) or a control, under a hard budget."""

    constraint: Constraint = "macs"
    """What the budget counts: macs, measured latency (first backend, thread count and batch size), or params."""
    budget: Fractions = (0.5,)
    """Fraction of the original network's cost that may stay; several, comma-separated, make a run each."""
    episodes: int = 100
    """Policies tried, the warm-up included."""
    warm_up: int = 25
    """Episodes of random policies before the agent learns and decides."""
    sigma: float = 0.5
    """Exploration noise of the agent's actions (kept fractions) after the warm-up."""
    sigma_decay: float = 0.95
    """Factor of sigma from episode to episode."""
    refine: float = 0.5
    """Share of the agent's episodes that vary the best policy found so far instead of asking the agent (0: AMC as published)."""
    reward: Literal["accuracy", "error_log_cost"] = "accuracy"
    """accuracy on the validation subset, or -error * log(1 + cost)."""
    importance: ImportanceName = "taylor_squared"
    """Which channels of a layer stay."""
    reconstruct: bool = False
    """Fit each layer behind pruned channels to the unpruned network by least squares before scoring."""
    lowest: float = 0.1
    """Fraction of its channels that every layer keeps at least."""
    highest: float = 1.0
    """Fraction of its channels that every layer keeps at most."""
    multiple: int = 8
    """Widths are multiples of this (or the whole layer)."""
    images: int = 2000
    """Validation images that policies are scored on; fixed, held in memory."""
    calibration: int = 128
    """Training images that batch norms are recalibrated on for each policy."""
    precision: Annotated[Precision, tyro.conf.arg(name="scoring-precision")] = "auto"
    """Of scoring: auto takes bfloat16 where the processor computes in it, else float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.budget) > 0, "budget is empty; give at least one fraction, for example 0.5")
        for value in self.budget:
            require(0 < value <= 1, f"budget is {value}; it must be above 0 and at most 1")
        require_distinct("budget", self.budget)
        require_inside(self, "[1, inf)", "episodes", "multiple", "images")
        require_inside(self, "[0, inf)", "warm_up", "sigma")
        require_inside(self, "(0, 1]", "sigma_decay")
        require_inside(self, "[0, 1]", "refine")
        require_inside(self, "[2, inf)", "calibration")
        require(
            0 <= self.lowest <= self.highest <= 1,
            f"lowest is {self.lowest} and highest {self.highest}; use 0 <= lowest <= highest <= 1",
        )


@dataclass(frozen=True)
class AmcConfig(RunConfig):
    """Train MobileNetV2, remove its residuals and fuse, let an agent choose every layer's width, fine-tune, measure."""

    command: ClassVar[str] = "amc"
    model: str = "mobilenet_v2_digits"
    """Network by name: mobilenet_v2_digits (8 pixels), mobilenet_v2_small (28 to 32), mobilenet_v2, or any other."""
    width: float | None = None
    """Width multiplier of a MobileNet (base width of a ResNet)."""
    free: int = 1
    """Factor of the linear bottlenecks' width while training; fusing takes it out again. Budgets count against the wide network."""
    method: Names = ()
    """Ways to choose the widths, comma-separated; each is fine-tuned and measured from the same checkpoint (default: rm-amc, or
    plan-amc with --plan; see docs/methods.md)."""
    plan: Path | None = None
    """What plan-amc, plan-random and plan-uniform make of the residual blocks (a JSON file, as slim --plan takes it)."""
    apply: Literal["once", "gradual"] = "once"
    """Reach the best policy in one cut before fine-tuning, or in small cuts while fine-tuning."""
    seeds: int = 1
    """How many seeds, each with a training of its own."""
    checkpoint: Path | None = None
    """Start from trained weights instead of training: an artifact directory, or a .safetensors, .pt or .pth file."""
    train: Unprefixed[TrainConfig] = TrainConfig(epochs=30, weight_decay=1e-4)
    removal: RemovalConfig = RemovalConfig(ranges="calibrated", fuse="always")
    search: Unprefixed[SearchConfig] = SearchConfig()
    finetune: TrainConfig = TrainConfig(
        epochs=20, learning_rate=0.05, warmup_epochs=1.0, weight_decay=1e-4, distillation=0.5
    )
    prune_epochs: float = 5.0
    """Epochs of the fine-tuning over which gradual cuts are spread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_comparison(self)
        require_inside(self, "[1, inf)", "free")
        require_inside(self, "(0, inf)", "width", "prune_epochs")
        if not self.method:
            object.__setattr__(self, "method", ("rm-amc" if self.plan is None else "plan-amc",))
        planned = [name for name in self.method if name.startswith("plan-")]
        require(
            self.plan is not None or not planned, f"method {', '.join(planned)} is about a plan's blocks; give --plan"
        )
        require(
            self.plan is None or bool(planned), "no method looks at the plan; use plan-amc, plan-random or plan-uniform"
        )
