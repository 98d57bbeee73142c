"""Training settings are checked when they are made."""

import numpy as np
import pytest

from rmprune.config import PruneConfig, TrainConfig
from rmprune.errors import ConfigError


@pytest.mark.parametrize(
    "field",
    [
        {"epochs": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"momentum": 1.0},
        {"schedule": "linear"},
        {"precision": "float16"},
        {"clip_norm": 0.0},
        {"distillation": 1.5},
        {"epochs": "3"},
        {"momentum": [0.9]},
    ],
)
def test_settings_outside_their_range(field: dict):
    with pytest.raises(ConfigError, match=next(iter(field))):
        TrainConfig(**field)


def test_numbers_are_numbers_and_tuples_are_tuples() -> None:
    for wrong in ({"macs_ratio": 0.5}, {"macs_ratio": ("0.5",)}, {"round_to": 2.5}, {"min_fraction": "0.1"}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*; give "):
            PruneConfig(**wrong)
    PruneConfig(macs_ratio=[np.float32(0.5)], round_to=np.int64(8), min_fraction=None)
