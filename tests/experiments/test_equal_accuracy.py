"""Speed at equal accuracy: interpolated on the coupled front, and only between means over the same seeds."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "equal_accuracy.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("equal_accuracy", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["equal_accuracy"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def results(*rows: tuple[str, str, int, float, float]) -> pd.DataFrame:
    """results.csv of networks (method, budget, seed, accuracy, time ratio), each in a run of its own with its dense network."""
    made = []
    for number, (method, budget, seed, accuracy, ratio) in enumerate(rows):
        for name, of, right, part in (("dense", "", 0.9 + 0.02 * seed, 1.0), (method, budget, accuracy, ratio)):
            place = {"backend": "eager", "device": "cpu", "threads": 1, "batch_size": 1}
            times = dict.fromkeys(("median_ms", "q1_ms", "q3_ms"), 10 * part) | {"ratio": part}
            facts = {"model": "m", "dataset": "d", "method": name, "budget": of, "seed": seed, "run": str(number)}
            made.append({**facts, "accuracy": right, "macs": 100 * part, "params": 1, **place, **times})
    return pd.DataFrame(made)


ROWS = (
    ("coupled", "latency 0.1", 0, 0.70, 0.1),
    ("coupled", "latency 0.4", 0, 0.80, 0.4),
    ("mine", "latency 0.1", 0, 0.75, 0.1),
)


def test_time_is_interpolated_on_the_front(script: ModuleType) -> None:
    table = script.compare(results(*ROWS)).set_index("method")
    assert table.loc["mine", "speed at equal accuracy"] == "2.00x"  # 0.75 is reached at 0.2, half way in log time


@pytest.mark.parametrize(("accuracy", "said"), [(0.69, "less accurate"), (0.91, "more accurate")])
def test_beyond_the_front_no_time_is_made_up(script: ModuleType, accuracy: float, said: str) -> None:
    table = script.compare(results(*ROWS[:2], ("mine", "latency 0.1", 0, accuracy, 0.1))).set_index("method")
    assert table.loc["mine", "speed at equal accuracy"].startswith(said)


def test_a_front_of_one_point_is_compared_with_where_it_is_as_accurate(script: ModuleType) -> None:
    assert script.speed_at(0.9, 0.5, [(0.0, 0.9)]) == "2.00x" and script.speed_at(0.9, 0.5, []) == ""
    rows = results(*ROWS).assign(ratio=lambda data: data.ratio.where(data.budget != "latency 0.4"))
    front = script.front(rows[rows.method == "coupled"])
    assert [accuracy for _, accuracy in front] == [0.70]


def test_a_seed_that_the_front_lacks_is_left_out_of_both(script: ModuleType) -> None:
    more = (("coupled", "latency 0.1", 1, 0.9, 0.1), ("mine", "latency 0.1", 1, 0.95, 0.1))
    table = script.compare(results(*ROWS, *more)).set_index("method")
    assert table.loc["mine", "speed at equal accuracy"] == "2.00x" and table.loc["mine", "seeds"] == "0"


def test_what_cannot_be_compared_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no front"):
        script.compare(results(ROWS[2]))
    two = pd.concat([results(*ROWS), results(*ROWS).assign(dataset="other")])
    two.to_csv(tmp_path / "results.csv", index=False)
    with pytest.raises(SystemExit, match="several data sets"):
        script.read(script.Config((tmp_path / "results.csv",)))
