"""Training settings are checked when they are made."""

import pytest

from rmprune.config import TrainConfig
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
    ],
)
def test_settings_outside_their_range(field: dict):
    with pytest.raises(ConfigError, match=next(iter(field))):
        TrainConfig(**field)
