"""What a model puts out on a split, and how good that is; no training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.config import Precision
from rmprune.data.batches import check_labels, own_loss
from rmprune.data.splits import Split
from rmprune.errors import DataError, RmpruneError
from rmprune.graph.finite import broken_on
from rmprune.graph.memory_order import in_order, memory_order
from rmprune.graph.run import evaluating
from rmprune.training.distributed import add_up
from rmprune.training.precision import ask, autocast


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` from 0 to 1; `loss` is the mean cross-entropy, without label smoothing. Of a split with its own loss: NaN, and that."""

    accuracy: float
    loss: float


class NoOutputs(RmpruneError):
    """Outputs are NaN, which begins `where`."""

    def __init__(self, where: str) -> None:
        super().__init__(f"the network cannot be evaluated, its outputs are NaN: {where}")
        self.where = where


def evaluate(
    model: nn.Module, split: Split, *, device: torch.device | str = "cpu", batch_size: int = 512,
    limit: int | None = None, precision: Precision = "float32", shard: tuple[int, int] = (0, 1), weights: Tensor | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate in eval mode on the split's first `limit` images (all by default); the model is left in the mode it had.

    The model must be on `device` already. `shard`: (number of this process, processes), each of which takes part with its images and
    learns the result for all. `weights` [C]: of classes, by which the mean loss counts images. Raises NoOutputs, which says where that
    begins.
    """
    if split.loss is not None:
        return Evaluation(math.nan, mean_loss(model, split, torch.device(device), batch_size, limit, precision))
    logits, y = logits_of(
        model, split, device=device, batch_size=batch_size, limit=limit, precision=precision, shard=shard
    )
    loss = nn.functional.cross_entropy(logits, y, reduction="none").double()
    counts = torch.ones_like(loss) if weights is None else weights.to(loss)[y]
    hits = (logits.argmax(1) == y).double()
    sums = torch.stack([(counts * loss).sum(), counts.sum(), hits.sum(), torch.ones_like(hits).sum()])
    total, count, right, images = add_up(sums, shard[1]).tolist()
    return Evaluation(right / images, total / count if count else math.nan)


@torch.no_grad()
def logits_of(
    model: nn.Module, split: Split, *, device: torch.device | str = "cpu", batch_size: int = 512,
    limit: int | None = None, precision: Precision = "float32", shard: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The logits [N, C] in float32 and the labels [N], on `device`, as `evaluate` computes them, and refuses."""
    device = torch.device(device)
    found: list[tuple[Tensor, Tensor]] = []
    order: torch.memory_format | None = None
    with evaluating(model), autocast(precision, device):
        for x, y in split.batches(batch_size, device=device, limit=limit, shard=shard):
            order = order or memory_order(model, x)
            found.append((ask(model, in_order(x, order)).float(), y))
    if not found:
        raise DataError("there are no images to evaluate the network on")
    logits, labels = torch.cat([some for some, _ in found]), torch.cat([y for _, y in found])
    check_labels(labels, logits.shape[1])
    if logits.log_softmax(1).isnan().any():
        where = broken_on(model, x, evaluated=True) or "in some batches alone"
        raise NoOutputs(where)
    return logits, labels


@torch.no_grad()
def mean_loss(
    model: nn.Module, split: Split, device: torch.device, batch_size: int, limit: int | None, precision: Precision
) -> float:
    """The split's own loss over its batches, each counted by its images. Raises DataError where it fails, RmpruneError where the mean is no
    finite number."""
    assert split.loss is not None
    total, seen = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model), autocast(precision, device):
        for x, y in split.batches(batch_size, device=device, limit=limit):
            total += own_loss(split.loss, model, y).double() * len(x)
            seen += len(x)
    if not seen:
        raise DataError("there are no images to evaluate the network on")
    found = float(total) / seen
    if not math.isfinite(found):
        raise RmpruneError(f"the network cannot be evaluated, its loss is {found}")
    return found


def number_or_none(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if math.isnan(value) else value


def scores(logits: Tensor, labels: Tensor, names: Sequence[str] = ()) -> dict[str, Any]:
    """What a record says of a network, from its logits [N, C] and the labels [N]: `accuracy`; `balanced_accuracy`, the mean over the
    classes that are there of the part recognised; `auc`, the area under the ROC curve (scikit-learn's; of several classes the mean of
    each against the rest; None where a class is missing); `classes`, for each its name, images, recall and precision (None: never said).
    """
    from sklearn.metrics import roc_auc_score

    logits, labels = logits.cpu(), labels.cpu()
    count = logits.shape[1]
    told = logits.argmax(1)
    hits = torch.bincount(labels[told == labels], minlength=count).tolist()
    there, said = torch.bincount(labels, minlength=count).tolist(), torch.bincount(told, minlength=count).tolist()
    classes = [
        {
            "name": names[c] if names else str(c),
            "images": there[c],
            "recall": hits[c] / there[c] if there[c] else None,
            "precision": hits[c] / said[c] if said[c] else None,
        }
        for c in range(count)
    ]
    recalls = [entry["recall"] for entry in classes if entry["recall"] is not None]
    auc = None
    if min(there) > 0 and count > 1 and bool(logits.isfinite().all()):
        odds = _log_odds(logits.double())
        areas = [roc_auc_score(labels == c, odds[:, c]) for c in (range(count) if count > 2 else [1])]
        auc = float(sum(areas) / len(areas))
    return {
        "accuracy": sum(hits) / len(labels),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "auc": auc,
        "classes": classes,
    }


def _log_odds(logits: Tensor) -> Tensor:
    """Of each class against all others [N, C]: told apart where probabilities have long been rounded to 1."""
    chances, best = logits.log_softmax(1), logits.argmax(1, keepdim=True)
    others = logits.scatter(1, best, -math.inf).logsumexp(1, keepdim=True)
    return (chances - torch.log1p(-chances.exp())).scatter(1, best, logits.gather(1, best) - others)
