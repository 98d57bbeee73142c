"""What every training of one cell shares, said once: the job, and the files of each training. It decides nothing."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from rmprune.config import TrainConfig
from rmprune.data.batches import Batches, WithLoss, affordable
from rmprune.data.load import Dataset
from rmprune.data.splits import Batch
from rmprune.graph.copied import copied
from rmprune.graph.memory_order import memory_order
from rmprune.training.balance import balance
from rmprune.training.recentre import recentre
from rmprune.training.state import Hook
from rmprune.training.together import fit_together

Config = TypeVar("Config", covariant=True)
# Training images that importances are measured and layers fitted on, at most, fewer where they are large.
IMAGES = 2048
IMPORTANCE_BATCH = 128  # so many at a time


@dataclass(frozen=True)
class Job(Generic[Config]):
    """One cell's settings, images, device and seed. `teacher`: the trained original, which fine-tuning follows and times are relative
    to; `memory`: the folder that keeps its outputs (`rmprune.training.teacher`); `given`: a network that was trained elsewhere, in the
    place of one that is made by its name and trained; `given_with`: what its artifact notes of the loaders and the loss that came along."""

    config: Config
    data: Dataset
    device: torch.device
    seed: int
    teacher: nn.Module | None = None
    memory: Path | None = None
    given: nn.Module | None = None
    given_with: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def pairs(self) -> list[Batch]:
        """(images [B, C, H, W], channels last where the original takes them, labels [B]) of the first training images, IMAGES at most, on
        the device; held."""
        limit, order = affordable(IMAGES, self.data.input_shape[1:]), torch.channels_last
        if (network := self.given or self.teacher) is not None:
            order = memory_order(network, self.data.train.example(2))
        return list(self.data.train.batches(IMPORTANCE_BATCH, device=self.device, memory_format=order, limit=limit))

    @cached_property
    def batches(self) -> Batches:
        """The same as what channels are ranked by: with the loss, where the data have one of their own."""
        return self.with_loss(self.pairs)

    @cached_property
    def scored(self) -> dict[str, dict[str, Tensor]]:
        """Importances of networks on these images, by a digest of network and groups: what is cut in several ways is ranked once."""
        return {}

    def with_loss(self, pairs: list[Batch]) -> Batches:
        """Batches of the training images, with the loss where they have one of their own."""
        loss = self.data.train.loss
        return pairs if loss is None else WithLoss([y for _, y in pairs], loss)

    def examples(self, count: int) -> Tensor:
        """The first `count` of these images [count, C, H, W], or all."""
        found: list[Tensor] = []
        for x, _ in self.pairs:
            found.append(x[: count - sum(map(len, found))])
            if sum(map(len, found)) == count:
                break
        return torch.cat(found)

    def here(self, network: nn.Module) -> nn.Module:
        """The network on the device: itself where it is there already, else a copy."""
        there = {tensor.device.type for tensor in network.parameters()} <= {self.device.type}
        return network if there else copied(network).to(self.device)

    def ready(self, network: nn.Module) -> nn.Module:
        """The network, on the CPU, in the form that fine-tuning starts from best, the same function: batch norms re-centred on these images
        (`rmprune.training.recentre`), rows before them balanced (`rmprune.training.balance`)."""
        return balance(recentre(self.here(network), (x for x, _ in self.pairs)), self.batches).cpu()

    @property
    def original(self) -> nn.Module:
        """The teacher, where there must be one."""
        assert self.teacher is not None, "this job has no trained original"
        return self.teacher


@dataclass(frozen=True)
class Files:
    """What one training keeps: the file from which it goes on, the log that it adds to, and its name in both.

    shared: the directory of what is the same for every budget of its seed; None: beside the checkpoint.
    """

    checkpoint: Path
    log: Path
    label: str
    shared: Path | None = None

    @classmethod
    def of(cls, directory: Path, label: str, shared: Path | None = None) -> "Files":
        """Those of the training `label` in a run directory; `shared`: that of its seed."""
        common = None if shared is None else shared / "checkpoint"
        return cls(directory / "checkpoint" / f"{label}.pt", directory / "log.jsonl", label, common)

    def named(self, label: str) -> "Files":
        """Those of another training in the same place."""
        return replace(self, checkpoint=self.checkpoint.with_name(f"{label}.pt"), label=label)

    def note(self, name: str) -> Path:
        """A JSON file that belongs to this training, beside its checkpoint."""
        return self.checkpoint.with_name(f"{self.label}-{name}.json")

    def shared_note(self, name: str) -> Path:
        """The same for what does not go by the budget."""
        return (self.shared or self.checkpoint.parent) / f"{self.label}-{name}.json"


def tune(network: nn.Module, train: TrainConfig, job: Job[object], files: Files, hook: Hook | None = None) -> nn.Module:
    """`fit` by a job, on all processes of the command: a trained copy in eval mode, on the CPU."""
    return fit_together(
        network, job.data, train, seed=job.seed, device=job.device, hook=hook, teacher=job.teacher,
        teacher_memory=job.memory, checkpoint=files.checkpoint, log=files.log, label=files.label,
    ).cpu()  # fmt: skip
