"""Commands that train nothing: inspect, convert, measure, report, deploy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes as Unprefixed

from rmprune.config.fields import Settings, require, require_inside
from rmprune.config.measure import MeasureConfig
from rmprune.config.runs import REMOVAL, Architecture, RemovalConfig


@dataclass(frozen=True)
class NetworkConfig(Architecture):
    """A network to look at: a name or an artifact, and the images it takes."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A network's name (resnet50, timm/resnet26, ...), an artifact directory, or FILE.onnx."""
    image_size: int | None = None
    """Height and width of the images (default: what artifact or file say, 32 for CIFAR networks, else 224)."""
    in_channels: int = 3
    """Channels of the images."""
    num_classes: int = 1000
    """Classes."""
    width: int | None = None
    """Base width, for networks that have one."""
    checkpoint: Path | None = None
    """Trained weights for a named network: an artifact directory, or a .safetensors, .pt or .pth file."""


@dataclass(frozen=True)
class InspectConfig(Settings):
    """Each residual of a network: removable or why not, in which form, and what it costs. Nothing is written."""

    network: Unprefixed[NetworkConfig]
    removal: Unprefixed[RemovalConfig] = REMOVAL


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """Remove residuals and write the plain network; nothing is trained or pruned."""

    network: Unprefixed[NetworkConfig]
    out: Path
    """Directory of the new artifact (architecture.json, model.safetensors, model.onnx)."""
    removal: Unprefixed[RemovalConfig] = REMOVAL
    batch_norm: bool = False
    """Keep batch norms, for training; without, they are folded into the convolutions."""
    onnx: bool = True
    """Write model.onnx as well."""
    check: bool = False
    """Load what was written and compare its outputs, and ONNX Runtime's, with the original's."""
    overwrite: bool = False
    """Replace an artifact that is there already."""


@dataclass(frozen=True)
class RemeasureConfig(Settings):
    """Measure the networks of finished runs again, all in turns in one process, and update their records; or ONNX files."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or directories that hold them; or ONNX files, which are measured as they stand (by default in onnxruntime)."""
    measure: Unprefixed[MeasureConfig] = MeasureConfig()
    image_size: int | None = None
    """Height and width of the images of ONNX files that leave them open (default: 224)."""
    data_dir: Path | None = None
    """Where the images of the runs lie now, if not where they were trained on; read for number formats below float32 (a CSV of labels may
    lie there too)."""
    profile: bool = False
    """Where the time of each network goes, layer by layer, as ONNX Runtime's profiler sees it on the CPU, for the first of the thread
    numbers and batch sizes: printed, and kept in the record."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.runs) > 0, "there is nothing to measure; give run directories or ONNX files")
        require_inside(self, "[1, inf)", "image_size")


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Tables and figures from records."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, directories that hold them, or record files."""
    out: Path = Path("reports")
    """Where CSV, figures and the page go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.runs) > 0, "there is nothing to report; give run directories or records")


@dataclass(frozen=True)
class DeployConfig(Settings):
    """A network of a finished run, ready to be used: ONNX, int8, predict.py, a model card, a ranking of all its networks."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    network: str | None = None
    """Another network than the run's best on validation images, as ranking.json calls it (pruned, seed0/macs_ratio-0.5/uniform, ...)."""
    int8_loss: float = 0.01
    """Accuracy on validation images, from 0 to 1, that int8 may lose at most; where it loses more there is no int8 form."""
    data_dir: Path | None = None
    """Where the run's images lie now, if not where it was trained on them (its CSV of labels may lie there too)."""
    out: Path | None = None
    """Where it goes (default: deploy/ in the run); one that is there is replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_inside(self, "[0, 1)", "int8_loss")
