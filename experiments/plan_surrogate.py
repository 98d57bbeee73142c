"""Does the surrogate of `slim --method auto` rank plans as they turn out? Predicted against realised loss, once, on the digits.

    python experiments/plan_surrogate.py      # writes reports/plan-surrogate; a minute or two

One network is trained; plans of random choices for its blocks, each with the best widths that the surrogate knows for them, are cut to one
budget in MACs and fitted. Realised: the cross-entropy on validation images and the KL divergence from the original's outputs there, before
any fine-tuning. What is assumed is that the losses of single changes add up; the rank correlation says how far that goes.
"""

import random
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from rich.console import Console

from rmprune.config import PruneConfig, SlimConfig, TrainConfig
from rmprune.data.load import load_dataset
from rmprune.errors import RmpruneError
from rmprune.measure import count_macs
from rmprune.methods.cutter import make_cutter
from rmprune.methods.outlook import look, propose
from rmprune.methods.slim import met
from rmprune.methods.table import Method
from rmprune.models import create
from rmprune.pruning import Budget
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.pruning.proposals import Proposals
from rmprune.pruning.surrogate import Ends
from rmprune.runs.writing import write_text
from rmprune.training import fit
from rmprune.training.job import Files, Job


@dataclass(frozen=True)
class Arguments:
    """Which network, and how many plans."""

    model: str = "resnet8"
    """A network of rmprune.models for small images."""
    macs_ratio: float = 0.2
    """The budget of every plan."""
    plans: int = 24
    """Plans of random choices."""
    epochs: int = 15
    """Of training."""
    seed: int = 0
    """Of training and of the choices."""
    out: Path = Path("reports/plan-surrogate")
    """Where the table goes."""


def main(arguments: Arguments) -> None:
    """Train, propose, carry out, compare."""
    config = SlimConfig(model=arguments.model, prune=PruneConfig(macs_ratio=(arguments.macs_ratio,)), out=arguments.out)
    data, cpu = load_dataset(config.data), torch.device("cpu")
    torch.manual_seed(arguments.seed)
    network = create(arguments.model, num_classes=data.num_classes, in_channels=data.input_shape[0])
    network = fit(network, data, TrainConfig(epochs=arguments.epochs), seed=arguments.seed, device=cpu).eval()
    job = Job(config, data, cpu, arguments.seed, teacher=network)
    reference = count_macs(network, data.train.example(1))
    budget = Budget.from_config(config.prune, "macs_ratio", arguments.macs_ratio, reference_macs=reference)
    files = Files.of(arguments.out / "work", "plan")
    outlook = look(network, budget, job)
    surrogate = propose(outlook, job, files)
    images, labels = next(data.validation.batches(len(data.validation), device=cpu))
    ends, draw, rows, seen = Ends.of(network, images, labels), random.Random(arguments.seed), [], set()
    while len(rows) < arguments.plans and len(seen) < 20 * arguments.plans:
        fixed = {block: draw.choice(list(own)) for block, own in outlook.nothing.items()}
        key = tuple(fixed.items())
        losses = {block: {choice: surrogate.losses[block][choice]} for block, choice in fixed.items()}
        found = None if key in seen else Proposals(surrogate.sights, outlook.layers, losses).best(outlook.limit)
        seen.add(key)
        if found is None:
            continue
        try:
            plain, _ = carry_out_blocks(network, found.blocks, job.examples)
            cutter = make_cutter(plain, Method("a plan"), job, budget, found.widths)
            kl, loss = ends.change(cutter.once(cutter.network, met(budget, cutter, files)))
        except RmpruneError as error:
            print(f"left out: {fixed}: {error}")
            continue
        said = " ".join(found.blocks.values())
        rows.append({"blocks": said, "predicted_kl": found.loss, "realised_kl": kl, "realised_loss": loss})
        print(f"{said}: predicted {found.loss:.3g}, realised {kl:.3g}, loss {loss:.3f}")
    table = pd.DataFrame(rows).sort_values("predicted_kl")
    ranks = table.drop(columns="blocks").corr(method="spearman")["predicted_kl"]
    summary = (
        f"Spearman, predicted KL against realised KL {ranks.realised_kl:.2f}, against loss {ranks.realised_loss:.2f}"
    )
    Console().print(f"{summary} ({len(table)} plans)")
    write_text(arguments.out / "plans.csv", table.round(5).to_csv(index=False))
    command = shlex.join(["python", "experiments/plan_surrogate.py", *sys.argv[1:]])
    write_text(arguments.out / "table.md", _page(arguments, command, summary, len(table)))


def _page(arguments: Arguments, command: str, summary: str, plans: int) -> str:
    return (
        f"# Predicted against realised loss of plans\n\n`{command}`: {arguments.model} on the digits, "
        f"{arguments.macs_ratio:g} of its MACs, one network, {plans} plans of random choices, validation images, before any "
        f"fine-tuning. {summary}. Every plan: [plans.csv](plans.csv).\n"
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
