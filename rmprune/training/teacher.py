"""The network that distillation follows, whose outputs are computed once for all trainings that ask it about the same batches."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmprune.data.load import Dataset
from rmprune.errors import ArtifactError
from rmprune.graph.memory_order import in_order
from rmprune.measure.cuda_graphs import Replayed
from rmprune.runs.writing import whole
from rmprune.training.precision import ask

LARGEST = 256 * 2**20  # bytes of an epoch's outputs that are still worth keeping


class Teacher:
    """A frozen network in eval mode, asked about every batch of a training with this seed and data.

    Batches follow from seed, epoch and number alone (`rmprune.data`), augmentation included, so all methods and budgets that are
    fine-tuned with one seed ask the same. `memory`: a folder that keeps the outputs of whole epochs, a file each, named by a digest of
    the weights and of all that decides what the network sees and how it computes; None keeps nothing. `replayed`: as a CUDA graph;
    `order`: in which the network reads images, by default as they come.
    """

    def __init__(
        self, network: nn.Module, data: Dataset, *, seed: int, dtype: torch.dtype, memory: Path | None = None,
        replayed: bool = False, order: torch.memory_format | None = None,
    ) -> None:  # fmt: skip
        self.memory, self.frozen = memory, network

        def answer(x: Tensor) -> Tensor:
            return ask(network, x if order is None else in_order(x, order))

        self.network: Callable[[Tensor], Tensor] = Replayed(answer) if replayed else answer
        self.batches = data.steps_per_epoch
        self.name = "" if memory is None else digest(network, asked_about(data) | {"seed": seed, "dtype": str(dtype)})
        self.epoch = -1
        self.known: Tensor | None = None  # outputs [batches, B, classes] of this epoch, where the images are
        self.heard: list[Tensor] = []  # those of its first batches, there too

    def outputs(self, x: Tensor, epoch: int, batch: int) -> Tensor:
        """The logits [B, classes] for images x [B, C, H, W], batch `batch` of epoch `epoch`, both counted from 0."""
        if epoch != self.epoch:
            self.epoch, self.known, self.heard = epoch, self._read(epoch, x.device), []
        if self.known is not None:
            return self.known[batch]
        with torch.no_grad():
            found = self.network(x)
        if self.memory is not None and batch == len(self.heard) and found.nbytes * self.batches <= LARGEST:
            self.heard.append(found.clone())
            if len(self.heard) == self.batches:
                self._write(epoch)
        return found

    def _file(self, epoch: int) -> Path:
        assert self.memory is not None
        return self.memory / f"{self.name}-{epoch + 1}.safetensors"

    def _read(self, epoch: int, device: torch.device) -> Tensor | None:
        """What is kept of this epoch; a damaged file counts as none and is written anew."""
        if self.memory is None or not self._file(epoch).is_file():
            return None
        with contextlib.suppress(SafetensorError, OSError, KeyError):
            known = load_file(self._file(epoch))["outputs"]
            return known.to(device) if len(known) == self.batches else None
        return None

    def _write(self, epoch: int) -> None:
        """Keep the epoch; a full disk costs only the time that this would have saved."""
        with contextlib.suppress(ArtifactError), whole(self._file(epoch)) as work:
            save_file({"outputs": torch.stack(self.heard).cpu()}, work)


def asked_about(data: Dataset) -> dict[str, Any]:
    """What decides the images of a training's batches, but for the seed."""
    settings = dataclasses.asdict(data.config)
    return {key: value for key, value in settings.items() if key not in ("workers", "cache")} | {
        "images": len(data.train)
    }


def digest(network: nn.Module, asked: dict[str, Any]) -> str:
    """16 hex digits for the weights of a network and what it is asked."""
    found = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        if not isinstance(tensor, Tensor):  # of get_extra_state
            found.update(f"{name} {tensor!r}".encode())
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over a batch of logits [B, classes], each image's times its weight
    in `weights` [B].

    The factor T^2 keeps the size of the gradient independent of the temperature (section 2 of the paper).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    if weights is None:
        return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    each = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    return temperature**2 * (weights * each).mean()
