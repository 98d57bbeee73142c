"""Does a network's time depend on what else is measured in turns with it? Caches are shared: a network whose weights fit no cache
beside those of others is slow until they are back, and a small one is not, so a ratio would depend on the company.

    python experiments/company.py --out reports/company

EfficientNet-Lite0 at 96 pixels (untrained, 13 MB) and one cut to half of its MACs, ONNX Runtime, one thread, batch 1: the ratio of their
times, measured by themselves and beside three more copies of the small one, several times in turns. Goal: medians within 2 %.
"""

import argparse
import copy
from pathlib import Path

import pandas as pd
import torch

import rmprune
from rmprune.measure.latency import Configuration, measure_at
from rmprune.measure.machine import environment

GOAL = 0.02
PLACE = Configuration("onnxruntime", "cpu", 1, 1)


def main() -> None:
    """Measures, prints, writes company.csv; fails where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/company"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(1, 3, 96, 96)
    whole = rmprune.models.create("timm/efficientnet_lite0", num_classes=10).eval()
    half = rmprune.prune(whole, x, importance="magnitude", budget=rmprune.Budget(macs_ratio=0.5, round_to=8))
    copies = {f"copy {i}": copy.deepcopy(half) for i in range(3)}
    rows = []
    for repeat in range(arguments.repeats):
        for company, others in (("by themselves", {}), ("beside three", copies)):
            found = measure_at(
                PLACE, {"whole": whole, "half": half, **others}, x, seconds=arguments.seconds, min_rounds=15,
                reference="whole", sittings=1, warn=False,
            )  # fmt: skip
            own = {
                "whole_ms": found["whole"].median_ms,
                "half_ms": found["half"].median_ms,
                "ratio": found["half"].ratio,
            }
            rows.append({"repeat": repeat, "company": company, **own})
    table = pd.DataFrame(rows).assign(processor=environment()["processor"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out / "company.csv", index=False, float_format="%.4f")
    medians = table.groupby("company", sort=False)[["whole_ms", "half_ms", "ratio"]].median()
    print(medians.round(4).to_string())
    apart = abs(medians.ratio["beside three"] / medians.ratio["by themselves"] - 1)
    print(f"the ratios are {apart:.1%} apart (goal {GOAL:.0%})")
    raise SystemExit(int(apart > GOAL))


if __name__ == "__main__":
    main()
