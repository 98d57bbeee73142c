"""Batches as loaders give them: looked at as they are read, so that nothing is ranked or fitted on what it is not."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rmprune.errors import DataError

Batches = Iterable[tuple[Tensor, Tensor]]
"""(images [N, ...], labels [N]) and perhaps more, which is not read."""


def batches_of(data: Batches, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Images, in the floating-point type of the network, and labels of each batch, on its device; what is there is not copied.

    Raises DataError for batches of another form, and where there is none: an iterator that was used up before.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    found = False
    for batch in data:
        x, y = _pair(batch)
        if len(x) == 0:
            continue
        found = True
        yield (x, y) if like is None else (x.to(like.device, like.dtype), y.to(like.device))
    if not found:
        raise DataError(
            "data holds no images (an iterator that was used up before?); pass a loader, or a list of batches"
        )


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not all(isinstance(part, Tensor) for part in batch[:2]):
        kind = (
            f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, dict) else f"of type {type(batch).__name__}"
        )
        raise DataError(
            f"data: a batch is {kind}; give (images, labels), for example ((b['image'], b['label']) for b in loader) as a list"
        )
    x, y = batch[:2]
    if not x.is_floating_point():
        raise DataError(f"data: images are {x.dtype}; give them normalised, as the network was trained on them")
    if len(x) != len(y):
        raise DataError(f"data: a batch has {len(x)} images and {len(y)} labels")
    return x, y


def class_loss(outputs: Any, labels: Tensor) -> Tensor:
    """The mean cross entropy of outputs [N, classes, ...] with class numbers [N, ...], or with probabilities [N, classes, ...].

    Raises DataError where the network or the labels are no classifier's.
    """
    way_out = "rank by another importance, or give scores of your own as a table {layer: Tensor [channels]}"
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or outputs.shape[1] < 2:
        what = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(
            f"Taylor importance needs a network that gives one score a class, [N, classes, ...], not {what}; {way_out}"
        )
    if labels.shape == outputs.shape and labels.is_floating_point():
        return F.cross_entropy(outputs, labels)
    if labels.is_floating_point() or labels.dim() != outputs.dim() - 1:
        raise DataError(
            f"data: labels are {labels.dtype} of shape {tuple(labels.shape)}, not class numbers [N]; {way_out}"
        )
    least, most = (0, 0) if labels.is_meta else (int(labels.min()), int(labels.max()))
    if least < 0 or most >= outputs.shape[1]:
        raise DataError(f"data: labels from {least} to {most}, but the network has {outputs.shape[1]} classes")
    return F.cross_entropy(outputs, labels.long())
