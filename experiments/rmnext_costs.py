"""Parameters and MACs of RMNeXt next to ResNet-50/101/152, trained and plain: reports/rmnext/costs.csv and costs.md.

    python experiments/rmnext_costs.py

From the plan of removal at 224x224 (nothing is built or timed). The accuracies are the paper's own (arXiv 2111.00687).
"""

from pathlib import Path

import pandas as pd
import torch

from rmprune.measure.cost import count_macs, count_params
from rmprune.models.families import create
from rmprune.removal import plan_removal

REPORT = Path(__file__).resolve().parent.parent / "reports" / "rmnext"
PAPER_TOP1 = {
    "rmnext41x5_16": 78.50,
    "rmnext50x5_32": 79.08,
    "rmnext50x6_32": 79.57,
    "rmnext101x6_16": 80.07,
    "rmnext152x6_32": 80.36,
}
NAMES = ("resnet50", "resnet101", "resnet152", *PAPER_TOP1)


def costs(name: str) -> dict[str, object]:
    """One row: millions of parameters and GMACs, as trained and as plain network."""
    model, x = create(name).eval(), torch.zeros(1, 3, 224, 224)
    blocks = plan_removal(model, x, fuse="never")
    assert all(block.removable for block in blocks), name
    params, macs = count_params(model), count_macs(model, x)
    return {
        "model": name,
        "params_m": params / 1e6,
        "gmacs": macs / 1e9,
        "plain_params_m": (params + blocks.params_change) / 1e6,
        "plain_gmacs": (macs + blocks.macs_change) / 1e9,
        "paper_top1": PAPER_TOP1.get(name),
    }


def main() -> None:
    table = pd.DataFrame([costs(name) for name in NAMES]).round(3)
    REPORT.mkdir(parents=True, exist_ok=True)
    table.to_csv(REPORT / "costs.csv", index=False)
    lines = [
        "# What RMNeXt costs, trained and plain",
        "",
        "Made by `python experiments/rmnext_costs.py`: 224x224, millions of parameters and GMACs. Accuracies: the paper's own.",
        "",
        "| network | M parameters | GMACs | plain: M parameters | plain: GMACs | growth | ImageNet top-1 (paper) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in table.itertuples():
        top1 = "" if pd.isna(row.paper_top1) else f"{row.paper_top1:.2f}"
        lines.append(
            f"| {row.model} | {row.params_m:.1f} | {row.gmacs:.2f} | {row.plain_params_m:.1f} | {row.plain_gmacs:.2f} "
            f"| {row.plain_gmacs / row.gmacs:.2f}x | {top1} |"
        )
    (REPORT / "costs.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[4:]))


if __name__ == "__main__":
    main()
