"""The settings of every stage, one frozen dataclass each; no behaviour beyond refusing values outside their range.

The command line generates its flags from these classes: a field's docstring is its help text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes as Unprefixed

from rmprune.errors import ConfigError


def _comma_separated(kind: type[Any]) -> Any:
    """How the command line reads and shows a tuple: one word, values between commas."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()}[,...]",
        instance_from_str=lambda words: tuple(kind(value) for value in words[0].split(",") if value),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(map(str, values))],
    )


Names = Annotated[tuple[str, ...], _comma_separated(str)]
Numbers = Annotated[tuple[int, ...], _comma_separated(int)]
Fractions = Annotated[tuple[float, ...], _comma_separated(float)]


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless the condition holds (NaN fails every comparison, so it is refused too)."""
    if not condition:
        raise ConfigError(message)


def require_finite(config: Any) -> None:
    """Raise `ConfigError` for the first setting that is infinite or not a number: no record could hold it."""
    for name, value in vars(config).items():
        require(not isinstance(value, float) or math.isfinite(value), f"{name} is {value}; give a finite number")


def require_seed(name: str, value: int) -> None:
    """Raise `ConfigError` unless the generators take this seed."""
    require(0 <= value < 2**32, f"{name} is {value}; it must lie between 0 and {2**32 - 1}")


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class DataConfig:
    """Which images to train and test on, and how they are split and batched."""

    dataset: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100 or imagefolder."""
    data_dir: Path | None = None
    """Where the files lie, or where a download goes (not needed for digits)."""
    batch_size: int = 64
    """Images in a training batch (over all processes together)."""
    validation: float = 0.1
    """Fraction of the training images held back for selection; between 0 and 1."""
    split_seed: int = 0
    """Seed of the split into training and validation images. The test images never depend on it."""
    train_images: int | None = None
    """Train on so many images only, a fixed part drawn with split_seed."""
    workers: int = 2
    """Loader processes (imagefolder only)."""
    image_size: int = 224
    """Height and width of the images (imagefolder only)."""
    augment: bool = True
    """Random crops, and flips where the classes allow it."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}; it must be at least 1")
        require_seed("split_seed", self.split_seed)
        require(0 < self.validation < 1, f"validation is {self.validation}; it must lie between 0 and 1")
        require(
            self.train_images is None or self.train_images >= 1,
            f"train_images is {self.train_images}; it must be at least 1",
        )
        require(self.workers >= 0, f"workers is {self.workers}; it must not be negative")
        require(self.image_size >= 8, f"image_size is {self.image_size}; it must be at least 8")


# ------------------------------------------------------------------------------------------------------------ training

Schedule = Literal["cosine", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """One training or fine-tuning: SGD with Nesterov momentum."""

    epochs: int = 10
    """Passes over the training images."""
    learning_rate: float = 0.1
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """After the warm-up: cosine (down to 0) or constant."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rate climbs to its peak; fractions are fine."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 decay of convolution and linear weights; biases, batch norms and shortcut scales have none."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    clip_norm: float | None = 5.0
    """Largest norm of the gradient; None leaves it alone."""
    precision: Precision = "auto"
    """auto takes bfloat16 autocast where the processor computes in it, else float32."""
    channels_last: bool = True
    """Keep activations and weights in channels-last order (faster on most processors)."""
    checkpoint_seconds: float = 300.0
    """Save the checkpoint this often, besides after every epoch."""
    tensorboard: bool = False
    """Write TensorBoard files beside log.jsonl."""
    distillation: float = 0.0
    """Weight of the teacher's soft targets in the loss (0 to 1); needs a teacher."""
    temperature: float = 4.0
    """Temperature of the soft targets."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.epochs >= 0, f"epochs is {self.epochs}; it must not be negative")
        require(0 < self.learning_rate < float("inf"), f"learning_rate is {self.learning_rate}; it must be positive")
        require(self.schedule in ("cosine", "constant"), f"schedule is {self.schedule!r}; use 'cosine' or 'constant'")
        require(self.warmup_epochs >= 0, f"warmup_epochs is {self.warmup_epochs}; it must not be negative")
        require(0 <= self.momentum < 1, f"momentum is {self.momentum}; it must be at least 0 and below 1")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must not be negative")
        require(0 <= self.label_smoothing < 1, f"label_smoothing is {self.label_smoothing}; use 0 up to below 1")
        require(self.clip_norm is None or self.clip_norm > 0, f"clip_norm is {self.clip_norm}; it must be positive")
        require(
            self.precision in ("auto", "float32", "bfloat16"),
            f"precision is {self.precision!r}; use 'auto', 'float32' or 'bfloat16'",
        )
        require(self.checkpoint_seconds > 0, f"checkpoint_seconds is {self.checkpoint_seconds}; it must be positive")
        require(0 <= self.distillation <= 1, f"distillation is {self.distillation}; it must lie between 0 and 1")
        require(self.temperature > 0, f"temperature is {self.temperature}; it must be positive")


# ------------------------------------------------------------------------------------------------------------ sparsity

Scales = Literal["all", "inner"]


@dataclass(frozen=True)
class SparsityConfig:
    """Network slimming (Liu et al. 2017): the L1 penalty on batch-norm scales during training."""

    strength: float = 0.0
    """Total pull on a scale over the whole run: 1.0 takes a scale that the loss leaves alone from 1 to 0. 0 is off."""
    scales: Scales = "all"
    """all batch-norm scales, or only the inner ones of each block (those that no addition reads)."""
    shortcut_scales: bool = False
    """Train one penalised scale per channel of every identity shortcut; ranks what RM reserves."""

    def __post_init__(self) -> None:
        require(0 <= self.strength < float("inf"), f"strength is {self.strength}; it must not be negative")
        require(self.scales in ("all", "inner"), f"scales is {self.scales!r}; use 'all' or 'inner'")


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class MeasureConfig:
    """How the time of networks is measured: every combination of backend, threads and batch size."""

    backends: Annotated[Names, tyro.conf.arg(name="backend")] = ("onnxruntime", "eager")
    """Runtimes: eager, onnxruntime, openvino, torchscript, compile."""
    threads: Numbers = (2,)
    """Threads of the runtime."""
    batch_sizes: Annotated[Numbers, tyro.conf.arg(name="batch-size")] = (1, 32)
    """Images in a batch; times are for the whole batch."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    seconds: float = 2.0
    """Time spent on each network and combination."""
    min_rounds: int = 15
    """Rounds at least, whatever the time budget."""

    def __post_init__(self) -> None:
        for name in ("backends", "threads", "batch_sizes"):
            require(len(getattr(self, name)) > 0, f"{name} is empty; give at least one")
        require(min(self.threads) >= 1, f"threads is {self.threads}; each must be at least 1")
        require(min(self.batch_sizes) >= 1, f"batch_sizes is {self.batch_sizes}; each must be at least 1")
        require(0 <= self.seconds < float("inf"), f"seconds is {self.seconds}; it must not be negative")
        require(self.min_rounds >= 1, f"min_rounds is {self.min_rounds}; it must be at least 1")


# ------------------------------------------------------------------------------------------------------------- pruning

ImportanceName = Literal["batch_norm", "taylor", "taylor_squared", "magnitude", "activation", "random"]


@dataclass(frozen=True)
class PruneConfig:
    """Which channels go, by what budgets (one of ratio, macs_ratio and latency_ratio), at once or while training."""

    ratio: Fractions = ()
    """Fraction of the channels of the network being pruned that is removed; several, comma-separated, make a run each."""
    macs_ratio: Fractions = ()
    """Fraction of the original model's MACs that stays; several, comma-separated, make a run each."""
    latency_ratio: Fractions = ()
    """Fraction of the original model's measured time that stays; several, comma-separated, make a run each."""
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
    gradual: bool = True
    """Cut in small steps while training, instead of once before fine-tuning."""
    cuts: int = 30
    """How many small cuts."""
    cut_fraction: float = 0.5
    """Part of the fine-tuning over which the cuts are spread; what follows is fine-tuning alone."""
    score_decay: float = 0.5
    """Share of the old scores that survives a cut; 0 ranks by the steps since the last cut alone."""

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(name for name, _ in self.budgets)
        require(len(kinds) <= 1, f"{' and '.join(kinds)} are set; give one kind of budget")
        for name, value in self.budgets:
            require(0 < value < 1, f"{name} is {value}; it must lie between 0 and 1, both excluded")
        shown = [f"{value:g}" for _, value in self.budgets]  # cells are named by these
        require(len(set(shown)) == len(shown), f"{', '.join(kinds)} is {', '.join(shown)}; give every value once")
        require(self.min_channels >= 1, f"min_channels is {self.min_channels}; it must be at least 1")
        require(
            0 <= (self.min_fraction or 0.0) <= self.max_fraction <= 1,
            f"min_fraction is {self.min_fraction} and max_fraction {self.max_fraction}; use 0 <= min <= max <= 1",
        )
        require(self.round_to >= 1, f"round_to is {self.round_to}; it must be at least 1")
        require(self.cuts >= 1, f"cuts is {self.cuts}; it must be at least 1")
        require(0 < self.cut_fraction <= 1, f"cut_fraction is {self.cut_fraction}; use above 0 up to 1")
        require(0 <= self.score_decay < 1, f"score_decay is {self.score_decay}; use 0 up to below 1")

    @property
    def budgets(self) -> list[tuple[str, float]]:
        """(name, value) of every budget that is set, in the order given."""
        return [(name, value) for name in ("ratio", "macs_ratio", "latency_ratio") for value in getattr(self, name)]


# ------------------------------------------------------------------------------------------------- whole runs (pipelines)


def architecture(config: Any) -> dict[str, Any]:
    """The settings of a config that belong to the network itself, for `create_network`; None is left to its default."""
    return {name: getattr(config, name) for name in ("width", "depth", "reserve_ratio")}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What some networks can be asked for besides their width."""

    depth: int | None = None
    """Layers, for networks that have a choice (repvgg: 13, 21, 37, 69, 133)."""
    reserve_ratio: float | None = None
    """Fraction of the channels that RepVGG blocks pass on (0: plain RepVGG)."""


def transient() -> Any:
    """Metadata of a field that says where or whether to run, not what: it is left out of config.toml."""
    return {"transient": True}


@dataclass(frozen=True)
class SlimConfig(Architecture):
    """Train with sparsity, remove all residuals, prune the plain network freely, fine-tune, measure."""

    model: str = "resnet20"
    """Network by name: resnet20 ... resnet1202 (CIFAR), resnet18, resnet34, ... (torchvision), timm/NAME."""
    width: int | None = None
    """Base width, for networks that have one (resnet20: 16; resnet18: 64)."""
    method: Names = ("rm",)
    """Ways to prune, comma-separated; each is fine-tuned and measured from the same checkpoint (see README)."""
    seed: int = 0
    """First seed."""
    seeds: int = 1
    """How many seeds, each with a training of its own."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto takes the GPU where there is one."""
    checkpoint: Path | None = None
    """Start from trained weights instead of training: an artifact directory, or a .safetensors, .pt or .pth file."""
    data: Unprefixed[DataConfig] = DataConfig()
    train: Unprefixed[TrainConfig] = TrainConfig(epochs=25)
    sparsity: SparsityConfig = SparsityConfig(strength=0.8)
    prune: Unprefixed[PruneConfig] = PruneConfig()
    finetune: TrainConfig = TrainConfig(epochs=20, learning_rate=0.02, warmup_epochs=0.0)
    measure: MeasureConfig = MeasureConfig()
    out: Path | None = field(default=None, metadata=transient())
    """Run directory (default: runs/slim-MODEL-DATASET)."""
    overwrite: bool = field(default=False, metadata=transient())
    """Replace a finished run, or one with other settings, in that directory."""

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"seeds is {self.seeds}; it must be at least 1")
        require_seed("seed", self.seed)
        require(self.train.distillation == 0, "the original has no teacher; set --finetune.distillation instead")
        require(len(self.method) > 0, "method is empty; give at least one, for example rm")
        require(self.width is None or self.width >= 1, f"width is {self.width}; it must be at least 1")
        require(
            self.prune.cost == "macs" or self.measure.device == "cpu",
            f"cost='time' is a table measured on the CPU; use cost='macs', or measure.device cpu, not {self.measure.device}",
        )
        require(
            len(self.prune.budgets) > 0,
            "there is no budget; give --ratio, --macs-ratio or --latency-ratio, between 0 and 1",
        )

    @property
    def directory(self) -> Path:
        """Where the run is kept."""
        return self.out or Path("runs") / f"slim-{self.model.replace('/', '-')}-{self.data.dataset}"


@dataclass(frozen=True)
class TrainRunConfig(Architecture):
    """Train a network, remove its residuals for deployment, measure both; nothing is pruned."""

    model: str = "repvgg"
    """Network by name: repvgg, rmnext50x5_32, preact_resnet18, resnet20, ..."""
    width: int | None = None
    """Base width, for networks that have one."""
    seed: int = 0
    """Seed of the weights and of the order of the images."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto takes the GPU where there is one."""
    data: Unprefixed[DataConfig] = DataConfig()
    train: Unprefixed[TrainConfig] = TrainConfig(epochs=25)
    measure: MeasureConfig = MeasureConfig()
    out: Path | None = field(default=None, metadata=transient())
    """Run directory (default: runs/train-MODEL-DATASET)."""
    overwrite: bool = field(default=False, metadata=transient())
    """Replace a finished run, or one with other settings, in that directory."""

    @property
    def directory(self) -> Path:
        """Where the run is kept."""
        return self.out or Path("runs") / f"train-{self.model.replace('/', '-')}-{self.data.dataset}"


@dataclass(frozen=True)
class NetworkConfig(Architecture):
    """A network to look at: a name or an artifact, and the images it takes."""

    model: tyro.conf.Positional[str]
    """A network's name (resnet50, timm/resnet26, ...) or an artifact directory."""
    image_size: int | None = None
    """Height and width of the images (default: what the artifact says, 32 for CIFAR networks, else 224)."""
    in_channels: int = 3
    """Channels of the images."""
    num_classes: int = 1000
    """Classes."""
    width: int | None = None
    """Base width, for networks that have one."""
    checkpoint: Path | None = None
    """Trained weights for a named network: an artifact directory, or a .safetensors, .pt or .pth file."""


@dataclass(frozen=True)
class RemovalConfig:
    """How residuals are removed."""

    keep: Names = ()
    """Blocks whose residual stays, comma-separated (names as `inspect` prints them)."""
    ranges: Literal["provable", "calibrated"] = "provable"
    """Bounds that hold for every input, or tighter ones taken from the example images with a margin."""
    form: Literal["auto", "shift", "pair", "slice"] = "auto"
    """How copies pass an activation; auto takes the cheapest exact one for each block."""
    fuse: Literal["cheaper", "always", "never"] = "cheaper"
    """Consecutive linear convolutions become one: where that has fewer MACs, always, or never."""


@dataclass(frozen=True)
class InspectConfig:
    """Each residual of a network: removable or why not, in which form, and what it costs. Nothing is written."""

    network: Unprefixed[NetworkConfig]
    removal: Unprefixed[RemovalConfig] = RemovalConfig()


@dataclass(frozen=True)
class ConvertConfig:
    """Remove residuals and write the plain network; nothing is trained or pruned."""

    network: Unprefixed[NetworkConfig]
    out: Path
    """Directory of the new artifact (architecture.json, model.safetensors, model.onnx)."""
    removal: Unprefixed[RemovalConfig] = RemovalConfig()
    batch_norm: bool = False
    """Keep batch norms, for training; without, they are folded into the convolutions."""
    onnx: bool = True
    """Write model.onnx as well."""
    check: bool = False
    """Load what was written and compare its outputs, and ONNX Runtime's, with the original's."""
    overwrite: bool = False
    """Replace an artifact that is there already."""


@dataclass(frozen=True)
class RemeasureConfig:
    """Measure the networks of finished runs again, all in turns in one process, and update their records."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or directories that hold them."""
    measure: Unprefixed[MeasureConfig] = MeasureConfig()

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "there is nothing to measure; give run directories")


@dataclass(frozen=True)
class ReportConfig:
    """Tables and figures from records."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, directories that hold them, or record files."""
    out: Path = Path("reports")
    """Where CSV, figures and the page go."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "there is nothing to report; give run directories or records")


# ----------------------------------------------------------------------------------------------------------------- AMC

Constraint = Literal["macs", "latency", "params"]


@dataclass(frozen=True)
class SearchConfig:
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
    """accuracy on the validation subset, or -error * log(cost)."""
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
        require_finite(self)
        require(
            self.constraint in ("macs", "latency", "params"),
            f"constraint is {self.constraint!r}; use 'macs', 'latency' or 'params'",
        )
        require(len(self.budget) > 0, "budget is empty; give at least one fraction, for example 0.5")
        for value in self.budget:
            require(0 < value <= 1, f"budget is {value}; it must be above 0 and at most 1")
        shown = [f"{value:g}" for value in self.budget]  # cells are named by these
        require(len(set(shown)) == len(shown), f"budget is {', '.join(shown)}; give every value once")
        require(self.episodes >= 1, f"episodes is {self.episodes}; it must be at least 1")
        require(self.warm_up >= 0, f"warm_up is {self.warm_up}; it must not be negative")
        require(self.sigma >= 0, f"sigma is {self.sigma}; it must not be negative")
        require(0 < self.sigma_decay <= 1, f"sigma_decay is {self.sigma_decay}; use above 0 up to 1")
        require(0 <= self.refine <= 1, f"refine is {self.refine}; it must lie between 0 and 1")
        require(
            0 <= self.lowest <= self.highest <= 1,
            f"lowest is {self.lowest} and highest {self.highest}; use 0 <= lowest <= highest <= 1",
        )
        require(self.multiple >= 1, f"multiple is {self.multiple}; it must be at least 1")
        require(self.images >= 1, f"images is {self.images}; it must be at least 1")
        require(self.calibration >= 2, f"calibration is {self.calibration}; it must be at least 2")


@dataclass(frozen=True)
class AmcConfig(Architecture):
    """Train MobileNetV2, remove its residuals and fuse, let an agent choose every layer's width, fine-tune, measure."""

    model: str = "mobilenet_v2_digits"
    """Network by name: mobilenet_v2_digits (8 pixels), mobilenet_v2_small (28 to 32), mobilenet_v2, or any other."""
    width: float | None = None
    """Width multiplier of a MobileNet (base width of a ResNet)."""
    free: int = 1
    """Factor of the linear bottlenecks' width while training; costs nothing after fusing."""
    method: Names = ("rm-amc",)
    """Ways to choose the widths, comma-separated; each is fine-tuned and measured from the same checkpoint (see README)."""
    apply: Literal["once", "gradual"] = "once"
    """Reach the best policy in one cut before fine-tuning, or in small cuts while fine-tuning."""
    seed: int = 0
    """First seed."""
    seeds: int = 1
    """How many seeds, each with a training of its own."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto takes the GPU where there is one."""
    checkpoint: Path | None = None
    """Start from trained weights instead of training: an artifact directory, or a .safetensors, .pt or .pth file."""
    data: Unprefixed[DataConfig] = DataConfig()
    train: Unprefixed[TrainConfig] = TrainConfig(epochs=30, weight_decay=1e-4)
    removal: RemovalConfig = RemovalConfig(fuse="always")
    search: Unprefixed[SearchConfig] = SearchConfig()
    finetune: TrainConfig = TrainConfig(
        epochs=20, learning_rate=0.05, warmup_epochs=1.0, weight_decay=1e-4, distillation=0.5
    )
    prune_epochs: float = 5.0
    """Epochs of the fine-tuning over which gradual cuts are spread."""
    measure: MeasureConfig = MeasureConfig()
    out: Path | None = field(default=None, metadata=transient())
    """Run directory (default: runs/amc-MODEL-DATASET)."""
    overwrite: bool = field(default=False, metadata=transient())
    """Replace a finished run, or one with other settings, in that directory."""

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"seeds is {self.seeds}; it must be at least 1")
        require(self.width is None or self.width > 0, f"width is {self.width}; it must be above 0")
        require(self.free >= 1, f"free is {self.free}; it must be at least 1")
        require_finite(self)
        require_seed("seed", self.seed)
        require(self.train.distillation == 0, "the original has no teacher; set --finetune.distillation instead")
        require(len(self.method) > 0, "method is empty; give at least one, for example rm-amc")
        require(self.apply in ("once", "gradual"), f"apply is {self.apply!r}; use 'once' or 'gradual'")
        require(self.prune_epochs > 0, f"prune_epochs is {self.prune_epochs}; it must be positive")

    @property
    def directory(self) -> Path:
        """Where the run is kept."""
        return self.out or Path("runs") / f"amc-{self.model.replace('/', '-')}-{self.data.dataset}"
