"""What time do narrow networks take, width by width? `scratch` trains the widest within a budget, and the front of its networks is read
along straight lines between those that were trained; a width between them that takes less than its line says would be a better rival.

    python experiments/scratch_widths.py --out reports/auto-fashion-rate/scratch-widths.csv

Untrained networks of 28 pixels, all measured in turns in one process, ONNX Runtime, one thread: the time of each width relative to
width 32, medians of several repeats, and the MACs.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

import rmprune
from rmprune.measure.latency import Configuration, measure_at

WHOLE = 32
WIDTHS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16)


def main() -> None:
    """Measures, prints, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/auto-fashion-rate/scratch-widths.csv"))
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet18"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    image, rows = torch.randn(1, 1, 28, 28), []
    for model in arguments.models:
        networks = {
            width: rmprune.models.create(model, num_classes=10, in_channels=1, width=width).eval()
            for width in (WHOLE, *WIDTHS)
        }
        macs = {width: rmprune.count_macs(network, image) for width, network in networks.items()}
        for batch_size in (32, 1):
            place = Configuration("onnxruntime", "cpu", 1, batch_size)
            named = {str(width): network for width, network in networks.items()}
            for repeat in range(arguments.repeats):
                times = measure_at(
                    place,
                    named,
                    image,
                    seconds=arguments.seconds,
                    min_rounds=15,
                    reference=str(WHOLE),
                    sittings=1,
                    warn=False,
                )
                for width in WIDTHS:
                    own = {"width": width, "macs": macs[width] / macs[WHOLE], "ratio": times[str(width)].ratio}
                    rows.append({"model": model, "batch_size": batch_size, "repeat": repeat, **own})
    table = pd.DataFrame(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out, index=False, float_format="%.4f")
    medians = table.groupby(["model", "batch_size", "width"])[["macs", "ratio"]].median().reset_index()
    print(medians.pivot(index="width", columns=["model", "batch_size"], values="ratio").round(3).to_string())


if __name__ == "__main__":
    main()
