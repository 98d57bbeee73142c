"""Methods seed by seed: leads are paired, and what ran with some seeds only is compared on those."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "by_seed.py"
ACCURACIES = {"dense": (0.90, 0.80, 0.85), "residual": (0.80, 0.70, 0.75), "rm": (0.82, None, 0.79)}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("by_seed", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["by_seed"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results() -> pd.DataFrame:
    """results.csv of two methods and the dense network on three seeds, two batch sizes; `rm` lacks seed 1."""
    rows = [
        {
            "model": "m", "dataset": "d", "method": method, "budget": None if method == "dense" else "latency 0.5", "seed": seed,
            "accuracy": accuracy, "auc": accuracy, "macs": 100 if method == "dense" else 40, "backend": "eager", "device": "cpu",
            "threads": 1, "batch_size": batch, "ratio": 1.0 if method == "dense" else 0.4 + 0.01 * batch,
        }
        for method, accuracies in ACCURACIES.items()
        for seed, accuracy in enumerate(accuracies)
        for batch in (1, 8)
        if accuracy is not None
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_lead_is_that_on_common_seeds(script: ModuleType, results: pd.DataFrame) -> None:
    table = script.by_seed(results, "residual").set_index("method")
    assert list(table.budget) == ["dense", "latency 0.5", "latency 0.5"]
    row = table.loc["`rm`"]
    assert row["seeds"] == "0 2" and row["accuracy by seed, %"] == "82.0 / 79.0"
    assert row["accuracy, %"] == "80.5 ± 2.1"
    assert (
        row["ahead of `residual`, points"] == "+3.0 ± 1.0 (2 of 2)"
    )  # 2 and 4 points: not the difference of the means, 5.5
    assert row["MACs"] == "0.40x" and row["time, batch 1 / 8"] == "0.410 / 0.480"


def test_all_figures_of_a_row_are_of_the_same_seeds(script: ModuleType, results: pd.DataFrame) -> None:
    """Also where one of them was not timed at the first batch size."""
    some = results[~((results.method == "residual") & (results.seed == 1) & (results.batch_size == 1))]
    row = script.by_seed(some, "residual").set_index("method").loc["`residual`"]
    assert row["accuracy by seed, %"] == "80.0 / 70.0 / 75.0" and row["accuracy, %"] == "75.0 ± 5.0"
    assert row["AUC"] == "0.750 ± 0.050"


def test_one_seed_has_no_deviation(script: ModuleType, results: pd.DataFrame) -> None:
    table = script.by_seed(results[results.seed == 2], "residual").set_index("method")
    assert table.loc["`rm`", "accuracy, %"] == "79.0"
    assert table.loc["`rm`", "ahead of `residual`, points"] == "+4.0 (1 of 1)"


def test_files_that_cannot_be_compared_are_refused(script: ModuleType, results: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.to_csv(path, index=False)
    with pytest.raises(SystemExit, match="no row of uniform; it has dense, residual, rm"):
        script.main(script.Config(path, than="uniform"))
    for column, other in {
        "model": "other",
        "backend": "int8",
    }.items():  # in a number format of its own a network has another accuracy
        pd.concat([results, results.assign(**{column: other})]).to_csv(path, index=False)
        with pytest.raises(SystemExit, match=f"several values of {column}"):
            script.main(script.Config(path))
    assert not (tmp_path / "by-seed.md").exists()
