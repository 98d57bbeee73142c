"""What the experiment says of ratios that repeat themselves and of such that do not."""

import runpy
from pathlib import Path

import pandas as pd

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "measure_repeatability.py"))


def test_ratios_that_lie_apart_miss_the_goal() -> None:
    rows = [
        {
            "backend": backend,
            "threads": 1,
            "batch_size": 1,
            "ratio": ratio,
            "ratio_low": ratio - 0.01,
            "ratio_high": ratio + 0.01,
        }
        for backend, ratios in (("eager", (0.80, 0.81, 0.815)), ("onnxruntime", (0.80, 0.90, 0.85)))
        for ratio in ratios
    ]
    found = SCRIPT["summarise"](pd.DataFrame(rows)).set_index("backend")
    assert found.within_goal.to_dict() == {"eager": True, "onnxruntime": False}
    assert round(found.apart["onnxruntime"], 3) == 0.125 and found["count"].tolist() == [3, 3]
    assert found.median_in_interval["eager"] == 1.0 and round(found.median_in_interval["onnxruntime"], 2) == 0.33
