"""The settings of every stage, one frozen dataclass each; no behaviour beyond refusing values outside their range.

The command line generates its flags from these classes: a field's docstring is its help text.
"""

from rmprune.config.amc import AmcConfig, SearchConfig
from rmprune.config.commands import (
    ConvertConfig,
    DeployConfig,
    InspectConfig,
    NetworkConfig,
    RemeasureConfig,
    ReportConfig,
)
from rmprune.config.data import DataConfig
from rmprune.config.fields import require
from rmprune.config.measure import DoctorConfig, MeasureConfig
from rmprune.config.pruning import PruneConfig
from rmprune.config.runs import (
    REMOVAL,
    GridConfig,
    RemovalConfig,
    RunConfig,
    SlimConfig,
    TrainRunConfig,
    architecture,
)
from rmprune.config.training import Precision, Scales, SparsityConfig, TrainConfig

__all__ = [
    "REMOVAL", "AmcConfig", "ConvertConfig", "DataConfig", "DeployConfig", "DoctorConfig", "GridConfig",
    "InspectConfig", "MeasureConfig", "NetworkConfig", "Precision", "PruneConfig", "RemeasureConfig", "RemovalConfig",
    "ReportConfig", "RunConfig", "Scales", "SearchConfig", "SlimConfig", "SparsityConfig", "TrainConfig",
    "TrainRunConfig", "architecture", "require",
]  # fmt: skip
