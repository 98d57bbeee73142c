"""Budgets: what may be asked for, and a budget from its config."""

import pytest

from rmprune.config import PruneConfig
from rmprune.errors import ConfigError
from rmprune.pruning.budget import Budget


@pytest.mark.parametrize(
    "wrong",
    [{}, {"ratio": 0.5, "macs_ratio": 0.5}, {"ratio": 0.0}, {"ratio": 1.0}, {"macs_ratio": float("nan")},
     {"macs_ratio": "0.5"}, {"ratio": 0.5, "round_to": 2.5},
     {"ratio": 0.5, "round_to": 0}, {"macs_ratio": 0.5, "reference_macs": 0}, {"ratio": 0.5, "min_fraction": 0.6, "max_fraction": 0.5}],
)  # fmt: skip
def test_wrong_budgets_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Budget(**wrong)


def test_budget_from_config() -> None:
    config = PruneConfig(macs_ratio=(0.4, 0.2), round_to=8, min_fraction=0.2)
    name, value = config.budgets[1]
    assert Budget.from_config(config, name, value, reference_macs=7) == Budget(
        macs_ratio=0.2, reference_macs=7, round_to=8, min_fraction=0.2
    )
