"""What is made of settings from Python: of another type than a field's, it is refused by name; what stands for the type becomes it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmprune import Budget, config
from rmprune.config.toml import to_toml
from rmprune.errors import ConfigError, RmpruneError

ODD: list[Any] = [{1, 2}, {"a": 1}, object(), b"x", torch.ones(2), np.ones(2), lambda: 3, {3}, (object(),)]
NEEDED: dict[str, Any] = {
    "NetworkConfig": {"model": "resnet8"},
    "InspectConfig": {"network": config.NetworkConfig(model="resnet8")},
    "ConvertConfig": {"network": config.NetworkConfig(model="resnet8"), "out": Path("x")},
    "RemeasureConfig": {"runs": (Path("x"),)},
    "ReportConfig": {"runs": (Path("x"),)},
    "DeployConfig": {"run": Path("x")},
    "SlimConfig": {"prune": config.PruneConfig(ratio=(0.5,))},
    "GridConfig": {"prune": config.PruneConfig(ratio=(0.5,))},
    "Budget": {"ratio": 0.5},
}
KINDS = [getattr(config, name) for name in config.__all__ if name.endswith("Config") and name != "RunConfig"]


@pytest.mark.parametrize("kind", [*KINDS, Budget])
def test_no_field_takes_what_no_setting_is(kind: Any) -> None:
    for field in dataclasses.fields(kind):
        for value in ODD:
            with pytest.raises(RmpruneError, match=field.name) as caught:
                kind(**{**NEEDED.get(kind.__name__, {}), field.name: value})
            assert "\n" not in str(caught.value)


def test_the_message_names_the_field_and_its_type() -> None:
    for value in (3, "layer1", {1, 2}, [3]):
        with pytest.raises(ConfigError, match=r"^keep is .*; give tuple\[str, \.\.\.\]$"):
            config.RemovalConfig(keep=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^form is 'x'; use one of auto, shift, pair, slice$"):
        config.RemovalConfig(form="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^channels_last is 'no'; give bool$"):
        config.TrainConfig(channels_last="no")  # type: ignore[arg-type]
    for number in ({"epochs": True}, {"learning_rate": False}):  # TOML's and Python's booleans are numbers to nobody
        with pytest.raises(ConfigError, match=r"^(epochs is True; give int|learning_rate is False; give float)$"):
            config.TrainConfig(**number)
    with pytest.raises(ConfigError, match=r"^train is \{'epochs': 1\}; give TrainConfig$"):
        config.TrainRunConfig(train={"epochs": 1})  # type: ignore[arg-type]


def test_what_stands_for_a_type_becomes_it() -> None:
    made = config.PruneConfig(macs_ratio=[np.float32(0.5)], round_to=np.int64(8), min_fraction=torch.tensor(0.25))  # type: ignore[arg-type]
    assert made == config.PruneConfig(macs_ratio=(0.5,), round_to=8, min_fraction=0.25)
    assert type(made.round_to) is int and to_toml(made)
    assert config.TrainRunConfig(out="x").directory == Path("x")  # type: ignore[arg-type]
