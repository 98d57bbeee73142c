"""One training, and the sparsity in it."""

from dataclasses import dataclass, field
from typing import Literal

from rmprune.config.fields import Settings, changeable, require_inside

RateSchedule = Literal["cosine", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig(Settings):
    """One training or fine-tuning: SGD with Nesterov momentum."""

    epochs: int = 10
    """Passes over the training images."""
    learning_rate: float = 0.1
    """Peak learning rate."""
    head_rate: float = 1.0
    """Factor of the learning rate for the last layer, which is new where pretrained weights are of other classes."""
    schedule: RateSchedule = "cosine"
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
    """Keep activations and weights in channels-last order (faster on most processors), where the network works so."""
    sync_batch_norm: bool = False
    """Under torchrun, batch norms see the images of all processes, as one process would; else each its own part of the batch."""
    cuda_graph: bool = field(default=True, metadata=changeable())
    """On one GPU, record the kernels of a step once and launch them together from then on."""
    checkpoint_seconds: float = field(default=300.0, metadata=changeable())
    """Save the checkpoint this often, besides after every epoch."""
    tensorboard: bool = field(default=False, metadata=changeable())
    """Write TensorBoard files beside log.jsonl."""
    mlflow: bool = field(default=False, metadata=changeable())
    """Tell MLflow each epoch, in its experiment rmprune, where MLFLOW_TRACKING_URI says."""
    distillation: float = 0.0
    """Weight of the teacher's soft targets in the loss (0 to 1); needs a teacher."""
    temperature: float = 4.0
    """Temperature of the soft targets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_inside(self, "[0, inf)", "epochs", "warmup_epochs", "weight_decay")
        require_inside(self, "(0, inf)", "learning_rate", "head_rate", "clip_norm", "checkpoint_seconds", "temperature")
        require_inside(self, "[0, 1)", "momentum", "label_smoothing")
        require_inside(self, "[0, 1]", "distillation")


Scales = Literal["all", "inner"]


@dataclass(frozen=True)
class SparsityConfig(Settings):
    """Network slimming (Liu et al. 2017): the L1 penalty on batch-norm scales during training."""

    strength: float = 0.0
    """Total pull on a scale over the whole run: 1.0 takes a scale that the loss leaves alone from 1 to 0. 0 is off."""
    scales: Scales = "all"
    """all batch-norm scales, or only the inner ones of each block (those that no addition reads)."""
    shortcut_scales: bool = False
    """Train one penalised scale per channel of every identity shortcut; ranks what RM reserves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_inside(self, "[0, inf)", "strength")
