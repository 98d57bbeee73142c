"""Records of four runs: two seeds at two budgets."""

from pathlib import Path

import pytest
from record_examples import example, network, of_one_place

from rmprune.runs.records import read_record, write_record


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in (0, 1):
        for ratio in (0.5, 0.25):
            record = example(
                seed=seed,
                config={"model": {"name": "resnet20"}, "data": {"dataset": "digits"}, "prune": {"macs_ratio": ratio}},
                pruned=network(0.96 + 0.01 * seed, int(1e6 * ratio), 2 * ratio),
                coupled=network(0.95 + 0.01 * seed, int(1e6 * ratio), 2.5 * ratio),
            )
            write_record(tmp_path / "runs" / f"s{seed}-{ratio}" / "record.json", record)
    return tmp_path / "runs"


@pytest.fixture
def small(runs: Path) -> Path:
    """The same where it is not about the figure, which takes nearly all of a report's time."""
    for path in runs.glob("*/record.json"):
        write_record(path, of_one_place(read_record(path)))
    return runs
