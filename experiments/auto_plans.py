"""What `slim --method auto` tried in finished runs, plan by plan: what was predicted, and what came before fine-tuning.

    python experiments/auto_plans.py runs/auto-fashion --out reports/auto-fashion/plans.csv

Reads what each search left beside its checkpoints. Prints, for each search, the rank correlation of the surrogate's losses, as measured and
as believed, with what came, over the plans that it proposed after the presets' own blocks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro


@dataclass(frozen=True)
class Settings:
    """Runs, and where the table goes."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path = Path("plans.csv")


def rows(plans: Path) -> pd.DataFrame:
    """Of one search, by the file of its plans: lost is the loss on validation images over the uncut network's."""
    notes = json.loads(plans.read_text())
    known = notes["plans"]
    verdicts = json.loads(plans.with_name("auto-candidates.json").read_text())
    unpruned = json.loads(plans.with_name("auto-losses.json").read_text())["unpruned"]
    found = []
    for name, verdict in verdicts.items():
        plan, loss = known.get(name, {}), verdict.get("loss")
        parts = {f"{part}_kl": plan.get("parts", {}).get(part) for part in ("widths", "merge", "drop")}
        facts = {"candidate": name, "why": plan.get("why", ""), "blocks": " ".join(plan.get("blocks", {}).values())}
        lost = None if loss is None else loss - unpruned
        found.append(facts | parts | {"predicted": plan.get("predicted"), "loss": loss, "lost": lost})
    cell, seed = plans.parent.parent.name, plans.parent.parent.parent.name
    return pd.DataFrame(found).assign(seed=seed.removeprefix("seed"), budget=cell, search_seconds=notes.get("took"))


def main(settings: Settings) -> None:
    files = sorted(file for run in settings.runs for file in run.rglob("auto-plans.json"))
    if not files:
        raise SystemExit(f"{', '.join(map(str, settings.runs))}: no search of auto has ended there")
    whole = pd.concat([rows(file) for file in files], ignore_index=True)
    whole.round(5).to_csv(settings.out, index=False)
    proposed = whole[whole.predicted.notna() & ~whole.why.str.startswith("the blocks of")].dropna(subset="lost")
    sums = proposed.assign(measured=proposed[["widths_kl", "merge_kl", "drop_kl"]].sum(axis=1))
    for (seed, budget), own in sums.groupby(["seed", "budget"]):
        means = ", ".join(f"{name} {own[name].mean():.3f}" for name in ("measured", "predicted", "lost"))
        ranks = own[["measured", "predicted", "lost"]].corr("spearman")["lost"]
        ranked = f"rank correlation with lost: measured {ranks['measured']:.2f}, predicted {ranks['predicted']:.2f}"
        print(f"seed {seed}, {budget}: {len(own)} plans, means {means}; {ranked}")
    print(settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
