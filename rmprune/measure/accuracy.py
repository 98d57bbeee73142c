"""Accuracy of a network as a backend computes it, number format and all. No training, no timing."""

from typing import Any

import torch
from torch import Tensor, nn

from rmprune.data.splits import Split
from rmprune.errors import ConfigError
from rmprune.measure.backends import prepare, surroundings
from rmprune.measure.candidate import Candidate
from rmprune.measure.rounds import torch_threads

BATCH = 64
CALIBRATION = 256  # images; more move the least and greatest values hardly


def calibration_images(training: Split, count: int = CALIBRATION) -> Tensor:
    """`count` training images (all, if fewer), float32 [N, C, H, W], drawn with a fixed seed from the whole split."""
    found: list[Tensor] = []
    for x, _ in training.batches(min(count, len(training)), shuffle_seed=0):
        found.append(x)
        if sum(map(len, found)) >= count:  # batches of somebody's own loader are as large as they are
            break
    return torch.cat(found)[:count]


def backend_accuracy(
    model: nn.Module,
    split: Split,
    backend: str,
    *,
    device: str = "cpu",
    threads: int = 2,
    batch_size: int = BATCH,
    calibration: Tensor | None = None,
    limit: int | None = None,
) -> float:
    """Accuracy (0 to 1) on the split's first `limit` images (all by default), computed by `backend` in its number format.

    `calibration`: training images [N, C, H, W] for int8. Raises ConfigError as `measure_latencies` does, and where int8 gets none.
    """
    candidate = Candidate("model", model, split.example(1), calibration)
    where: dict[str, Any] = {"device": device, "threads": threads, "batch_size": batch_size, "limit": limit}
    return candidate_accuracy(candidate, split, backend, **where)


def candidate_accuracy(candidate: Candidate, split: Split, backend: str, **where: Any) -> float:
    """The same for a network that is made ready; `where`: the others of `candidate_logits`."""
    logits, labels = candidate_logits(candidate, split, backend, **where)
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def candidate_logits(
    candidate: Candidate,
    split: Split,
    backend: str,
    device: str = "cpu",
    threads: int = 2,
    batch_size: int = BATCH,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What the backend puts out for these images, [N, C], and their labels [N]. Raises ConfigError for a limit of no images."""
    seen = min(len(split), len(split) if limit is None else limit)
    if not seen:
        raise ConfigError("there is no image to measure accuracy on; give a limit of at least 1")
    batch_size = min(batch_size, seen)
    found: list[tuple[Tensor, Tensor]] = []
    with torch_threads(threads), surroundings(backend, device), torch.inference_mode():
        prepared = prepare(candidate, backend, device, threads, batch_size)
        for whole, labels in split.batches(batch_size, limit=seen):
            for x, y in zip(whole.split(batch_size), labels.split(batch_size), strict=True):
                full = torch.cat([x, x[:1].expand(batch_size - len(x), *x.shape[1:])])  # the batch size is fixed
                found.append((prepared.outputs(full)[: len(x)].clone(), y))
    return torch.cat([logits for logits, _ in found]), torch.cat([y for _, y in found])
