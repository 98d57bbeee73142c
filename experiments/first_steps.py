"""Do the first steps of fine-tuning undo a cut network? Its loss and the norm of its gradient, step by step.

    python experiments/first_steps.py runs/dense-0             # writes reports/solar-cells/first-steps.csv

Takes a finished run of `train` with its photos. The network is cut by each method to one budget in MACs and fitted as `slim` does it, and
takes the first steps of its fine-tuning, the trained network as teacher, on the same batches without augmentation. `rm` once with copies
that fit whatever may come (`provable`), once with those that fit what images show (`calibrated`); each once only re-centred, once balanced
as well (`rmprune.training.balance`). `expanding`: the part of the squared gradient that is in the 1x1 convolutions which open blocks. Goes
on from what is there.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from rmprune.artifact import files as artifact
from rmprune.config import DataConfig, PruneConfig, RemovalConfig, SlimConfig, TrainConfig
from rmprune.config.toml import from_dict
from rmprune.data.load import load_dataset
from rmprune.measure import count_macs
from rmprune.methods.cutter import make_cutter
from rmprune.methods.start import start
from rmprune.methods.table import METHODS
from rmprune.pipelines.stages import with_names
from rmprune.pruning import Budget
from rmprune.training import evaluate
from rmprune.training.job import Job
from rmprune.training.optimizer import make_optimizer
from rmprune.training.recentre import recentre
from rmprune.training.teacher import distillation_loss


@dataclass(frozen=True)
class Settings:
    """Which network, which methods."""

    run: Annotated[Path, tyro.conf.Positional]
    methods: tuple[str, ...] = ("rm", "residual")
    macs_ratio: float = 0.19
    """About what 0.3 of the time is for EfficientNet-Lite0."""
    learning_rates: tuple[float, ...] = (0.01, 0.005, 0.002)
    """The second is that of slim-128.toml."""
    steps: int = 24
    work: Path = Path("runs/first-steps")
    """Where the cut networks are."""
    out: Path = Path("reports/solar-cells/first-steps.csv")


@dataclass(frozen=True)
class OnlyRecentred(Job[SlimConfig]):
    """A job whose cut networks are not balanced."""

    def ready(self, network: nn.Module) -> nn.Module:
        return recentre(self.here(network), (x for x, _ in self.pairs)).cpu()


def job_of(settings: Settings, ranges: str, balanced: bool) -> Job[SlimConfig]:
    """As `slim` would fine-tune the run's network."""
    known = json.loads((settings.run / "record.json").read_text())["config"]
    data = from_dict(DataConfig, known["data"])
    tuning = TrainConfig(epochs=1, schedule="constant", distillation=0.5)
    config = SlimConfig(
        model=known["model"], batch_norm_eps=known.get("batch_norm_eps"), method=settings.methods, data=data,
        prune=PruneConfig(macs_ratio=(settings.macs_ratio,)), finetune=tuning, removal=from_dict(RemovalConfig, {"ranges": ranges}),
    )  # fmt: skip
    kind = Job if balanced else OnlyRecentred
    dense = artifact.load(settings.run / "dense").eval()
    return kind(config, load_dataset(data), torch.device("cpu"), known["seed"], teacher=dense)


def cut(name: str, settings: Settings, job: Job[SlimConfig], place: Path) -> nn.Module:
    """The network that a method leaves at the budget."""
    if not place.exists():
        network, method = with_names(job.original, job), METHODS[name]
        reference = count_macs(network, job.data.train.example(1))
        begun = (
            network if method.start == "dense" else start(network, method.start, job.examples, job.config.removal)[0]
        )
        budget = Budget.from_config(job.config.prune, "macs_ratio", settings.macs_ratio, reference_macs=reference)
        cutter = make_cutter(begun, method, job, budget)
        artifact.save(cutter.once(cutter.network, cutter.floored(budget)), place)
    return artifact.load(place).train()


def losses(network: nn.Module, job: Job[SlimConfig], batches: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Half of it the labels', half the teacher's, as in fine-tuning."""
    config, teacher = job.config.finetune, job.original
    for x, y in batches:
        with torch.no_grad():
            told = teacher(x)
        said = network(x)
        far = distillation_loss(said, told, config.temperature)
        yield (1 - config.distillation) * F.cross_entropy(said, y) + config.distillation * far


def steps(
    network: nn.Module, job: Job[SlimConfig], batches: list[tuple[Tensor, Tensor]], rate: float
) -> Iterator[dict[str, Any]]:
    """Loss and gradient before each step at this learning rate."""
    config = dataclasses.replace(job.config.finetune, learning_rate=rate)
    optimizer = make_optimizer(network, config)
    for number, loss in enumerate(losses(network, job, batches), 1):
        optimizer.zero_grad()
        loss.backward()
        squares = {name: float(p.grad.square().sum()) for name, p in network.named_parameters() if p.grad is not None}
        expanding = sum(found for name, found in squares.items() if name.endswith("conv_pw.weight"))
        norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm or float("inf"))
        optimizer.step()
        part = expanding / sum(squares.values())
        yield {"step": number, "loss": float(loss.detach()), "gradient": float(norm), "expanding": part}


def main(settings: Settings) -> None:
    settings.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, ranges, balanced in itertools.product(settings.methods, ("provable", "calibrated"), (False, True)):
        if METHODS[name].start == "dense" and ranges == "calibrated":
            continue  # nothing is removed
        job = job_of(settings, ranges, balanced)
        batches = list(job.data.train.batches(job.config.data.batch_size))[: settings.steps]
        begun = {"method": name, "ranges": ranges, "balanced": balanced}
        place = settings.work / f"{settings.run.name}-{name}-{ranges}{'-balanced' if balanced else ''}"
        for rate in settings.learning_rates:
            torch.manual_seed(0)
            network = cut(name, settings, job, place)
            own = begun | {"learning_rate": rate, "validation_loss": evaluate(network, job.data.validation).loss}
            rows += [own | row for row in steps(network, job, batches, rate)]
            print(pd.DataFrame(rows[-settings.steps :]).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(settings.out, index=False)
    by = table.groupby(["method", "ranges", "balanced", "learning_rate"], sort=False)
    begin = by[["validation_loss", "loss", "gradient", "expanding"]].first()
    part = {
        f"steps {a} to {b}": by.loss.apply(lambda own, a=a, b=b: own[a - 1 : b].mean()) for a, b in ((2, 8), (17, 24))
    }
    print(begin.assign(**part).round(3).to_string())
    print(settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
