"""Commands that train: what they have in common, slim, grid and train."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import OmitArgPrefixes as Unprefixed

from rmprune.config.data import DataConfig
from rmprune.config.fields import (
    Names,
    Settings,
    changeable,
    comma_separated,
    require,
    require_inside,
    require_seed,
    transient,
)
from rmprune.config.measure import MeasureConfig
from rmprune.config.pruning import OF_PLANS, PlannedChoice, PruneConfig
from rmprune.config.training import SparsityConfig, TrainConfig


def architecture(config: Any) -> dict[str, Any]:
    """The settings of a config that belong to the network itself, for `create_network`; None is left to its default."""
    free = getattr(config, "free", 1)
    found = {name: getattr(config, name) for name in ("width", "depth", "reserve_ratio", "batch_norm_eps")}
    return found | ({"free": free} if free > 1 else {})


@dataclass(frozen=True, kw_only=True)
class Architecture(Settings):
    """What networks can be asked for besides their width, and the weights that they start from."""

    depth: int | None = None
    """Layers, for networks that have a choice (repvgg: 13, 21, 37, 69, 133)."""
    reserve_ratio: float | None = None
    """Fraction of the channels that RepVGG blocks pass on (0: plain RepVGG)."""
    weights: str | None = None
    """Start from pretrained weights: imagenet (torchvision's or timm's own, by the network's name) or a .safetensors, .pt or .pth file.
    A head of other classes is replaced. Training then goes gently, unless told otherwise: fewer epochs, small steps for what the weights
    know and larger ones for the new head, and a weak pull of the sparsity."""
    weights_by_order: bool = False
    """Tensors of the file belong to the network's in their order, whatever their names; shapes must agree."""
    batch_norm_eps: float | None = None
    """What every batch norm adds to the variance (default: the network's own, mostly 1e-5); TensorFlow's weights are made for 1e-3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.weights_by_order or self.weights not in (None, "imagenet"),
            "weights_by_order says how a file is read; give --weights FILE, or leave it out",
        )
        require_inside(self, "(0, 1)", "batch_norm_eps")
        require(
            self.weights is None or getattr(self, "checkpoint", None) is None,
            "weights (training starts there) and checkpoint (trained already) are both set; give one of them",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Architecture):
    """What the commands that train have in common: where, on what, with which seed, and the directory that is made."""

    command: ClassVar[str]
    model: str
    """Network by name."""
    seed: int = 0
    """Seed of the weights and of the order of the images; the first, where there are several."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto takes the GPU where there is one."""
    deterministic: bool = field(default=False, metadata=changeable())
    """On a GPU, only kernels that give the same result every time: slower. On a CPU all do."""
    data: Unprefixed[DataConfig] = DataConfig()
    train: Unprefixed[TrainConfig] = TrainConfig(epochs=25)
    measure: MeasureConfig = MeasureConfig()
    out: Path | None = field(default=None, metadata=transient())
    """Run directory (default: runs/COMMAND-MODEL-DATASET)."""
    overwrite: bool = field(default=False, metadata=transient())
    """Replace a finished run, or one with other settings, in that directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seed("seed", self.seed)

    @property
    def directory(self) -> Path:
        """Where the run is kept."""
        return self.out or Path("runs") / f"{self.command}-{self.model.replace('/', '-')}-{self.data.dataset}"


def require_comparison(config: Any) -> None:
    """Raise `ConfigError` for what the commands that compare networks refuse alike: a judge that measures no untrained one, no seed, an
    original that learns from another."""
    config.measure.require_judge()
    require_inside(config, "[1, inf)", "seeds")
    require(config.train.distillation == 0, "the original has no teacher; set --finetune.distillation instead")


@dataclass(frozen=True)
class RemovalConfig(Settings):
    """How residuals are removed."""

    keep: Names = ()
    """Blocks whose residual stays, comma-separated (names as `inspect` prints them)."""
    ranges: Literal["provable", "calibrated"] = "provable"
    """Bounds that hold for every input, or tighter ones of example images, widened by half: exact inside, and easier to fine-tune."""
    form: Literal["auto", "shift", "pair", "slice"] = "auto"
    """How copies pass an activation; auto takes the cheapest exact one for each block."""
    fuse: Literal["cheaper", "always", "never"] = "cheaper"
    """Consecutive linear convolutions become one: where that has fewer MACs, always, or never."""


REMOVAL = RemovalConfig()
"""As the settings say it where nothing is set."""


@dataclass(frozen=True)
class SlimConfig(RunConfig):
    """Train with sparsity, remove residuals (all of them, or where that pays), prune, fine-tune, measure."""

    command: ClassVar[str] = "slim"
    model: str = "resnet20"
    """Network by name: resnet20 ... resnet1202 (CIFAR), resnet18, resnet34, ... (torchvision), timm/NAME."""
    width: int | None = None
    """Base width, for networks that have one (resnet20: 16; resnet18: 64)."""
    method: Names = ()
    """Ways to prune, comma-separated; each is fine-tuned and measured from the same checkpoint (default: auto with --macs-ratio or
    --latency-ratio, unless --gradual or --no-reconstruct is given; else rm)."""
    plan: Path | None = None
    """Carry out this plan (a JSON file: a choice for each block, a width for each channel group) instead of meeting a budget."""
    search_minutes: float | None = field(default=None, metadata=changeable())
    """How long method auto looks for better plans, once it has judged the presets and the first eight that its surrogate proposes (default:
    one for every 100 validation images, up to eight, then until four in a row, or as many, are no better, at most a minute)."""
    choices: Annotated[tuple[PlannedChoice, ...], comma_separated(str)] = ()
    """What method auto may make of each residual block, comma-separated: keep, remove, fuse, merge, drop (default: any). Without keep no
    residual addition is left: for devices that cannot add."""
    skip_infeasible: bool = field(default=False, metadata=changeable())
    """At budgets that a method cannot meet, as measured, compare without it and say so in the record; a budget that none can meet is left
    out (default: refuse the run)."""
    seeds: int = 1
    """How many seeds, each with a training of its own."""
    checkpoint: Path | None = None
    """Start from trained weights instead of training: an artifact directory, or a .safetensors, .pt or .pth file."""
    sparsity: SparsityConfig = SparsityConfig(strength=0.8)
    removal: Unprefixed[RemovalConfig] = RemovalConfig(ranges="calibrated")
    prune: Unprefixed[PruneConfig] = PruneConfig()
    finetune: TrainConfig = TrainConfig(epochs=20, learning_rate=0.05, distillation=0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_comparison(self)
        require_inside(self, "[1, inf)", "width")
        given = len(self.prune.budgets) > 0
        require(
            given or self.plan is not None,
            "there is no budget; give --ratio, --macs-ratio, --latency-ratio or --memory-ratio, between 0 and 1, or a --plan",
        )
        require(not given or self.plan is None, "a plan says every width itself; give --plan or a budget, not both")
        if self.plan is not None:
            require(self.method in ((), ("plan",)), "a plan is carried out by itself; leave out --method")
            require(
                self.removal.fuse == "cheaper", 'a plan says itself what is fused ("fuse": "always"); leave out --fuse'
            )
            set_ = [own.name for own in fields(self.prune) if getattr(self.prune, own.name) != own.default]
            idle = [f"--{name.replace('_', '-')}" for name in set_ if name not in OF_PLANS]
            require(not idle, f"a plan says every width itself, and is one cut; leave out {', '.join(idle)}")
        if not self.method:
            object.__setattr__(self, "method", ("plan" if self.plan is not None else self.prune.usual_method,))
        require(
            not self.prune.gradual or "auto" not in self.method,
            "auto looks for widths that one cut reaches, not cuts while training; leave out --gradual, or take another --method",
        )
        require_inside(self, "[0, 10000]", "search_minutes")
        require("plan" not in self.method or self.plan is not None, "method plan carries out a file; name it by --plan")
        require(
            not self.choices or "auto" in self.method,
            f"choices is for method auto, but the method is {', '.join(self.method)}; leave one of the two out",
        )


@dataclass(frozen=True)
class GridConfig(SlimConfig):
    """slim's comparison, each cell (a seed, a budget, a method) on a worker of its own; then all measured by one."""

    command: ClassVar[str] = "grid"
    cluster: Literal["local", "slurm"] = "local"
    """Workers are processes of this machine, or jobs of Slurm."""
    jobs: int = 2
    """Cells at work at once."""
    gpus: int = 0
    """GPUs of each worker."""
    hours: float = 24.0
    """After this time a worker is stopped; its cell goes on in another."""
    slurm: Names = ()
    """More for sbatch, comma-separated: partition=gpu,cpus_per_task=8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_inside(self, "[1, inf)", "jobs")
        require_inside(self, "[0, inf)", "gpus")
        require_inside(self, "(0, 100000)", "hours")
        require(all("=" in pair for pair in self.slurm), f"slurm is {', '.join(self.slurm)}; use NAME=VALUE,NAME=VALUE")


@dataclass(frozen=True)
class TrainRunConfig(RunConfig):
    """Train a network, remove its residuals for deployment, measure both; nothing is pruned."""

    command: ClassVar[str] = "train"
    model: str = "repvgg"
    """Network by name: repvgg, rmnext50x5_32, preact_resnet18, resnet20, ..."""
    width: int | None = None
    """Base width, for networks that have one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.train.distillation == 0, "there is no teacher here; leave --distillation at 0")
        require_inside(self, "[1, inf)", "width")
