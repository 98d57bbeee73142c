"""Batches as loaders give them, and the loss that says what matters: looked at as they are read, so that nothing is ranked or fitted
on what it is not."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from rmprune.errors import ConfigError, DataError, first_line, loader_killed
from rmprune.graph.finite import broken_tensor
from rmprune.graph.run import evaluating, hooked, on_copies

Batches = Iterable[Any]
"""(images [N, ...], labels [N]) and perhaps more, which is not read; with a loss of one's own, whatever that takes."""
# Of all images together, where their maps are held or a network sees them many times: 8192 images of 32 x 32, 512 of 128 x 128.
PIXELS = 2**23
# Of those that a network takes at a time where gradients are held: 32 images of 128 x 128; new memory is slow.
PART = 2**19
Loss = Callable[[nn.Module, Any], Tensor]
"""loss(model, batch): runs the model on (part of) the batch and returns a scalar, lower for better."""


@dataclass(frozen=True)
class WithLoss:
    """Batches of any form, and the function that runs a network on one of them."""

    batches: Batches
    loss: Loss
    first: int = 0
    """The number of the first batch, in errors."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def affordable(most: int, size: Sequence[int], pixels: int = PIXELS) -> int:
    """How many images of `size` (H, W) are looked at: `most` of them, fewer where they are large, but no fewer than 64 for that."""
    return min(most, max(64, pixels // math.prod(size)))


def with_loss(data: Batches | None, loss: Loss | None) -> Batches | None:
    """The data held, to be read more than once, with the loss where one is given, or comes with them. Raises DataError for what holds no
    batches, ConfigError for a loss without data."""
    if data is None:
        if loss is not None:
            raise ConfigError("a loss is measured on batches: pass data as well")
        return None
    if isinstance(data, WithLoss):
        return data
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise DataError(f"data is of type {type(data).__name__}; pass a loader, or a list of batches")
    held = data if isinstance(data, list | tuple) else list(data)
    return held if loss is None else WithLoss(held, loss)


def each_pass(data: Batches, model: nn.Module) -> Iterator[Callable[[], object]]:
    """For each batch, what runs the network on it: for those that read layers by hooks. Raises DataError as `each_loss` does."""
    if isinstance(data, WithLoss):
        yield from (run for run, _ in each_loss(data, model))
        return
    for x, _ in labelled(data, model):
        yield functools.partial(_scores, model, x)


def watch_passes(data: Batches, model: nn.Module, hooks: Iterable[RemovableHandle]) -> None:
    """Runs the network on every batch, in eval mode and without gradients, while these hooks look. Raises DataError as `each_pass`."""
    with hooked(hooks), evaluating(model), torch.no_grad():
        for run in each_pass(data, model):
            run()


def each_loss(data: Batches, model: nn.Module) -> Iterator[tuple[Callable[[], Tensor], int]]:
    """For each batch, what computes its loss, a scalar: the loss that came with the data, else the mean cross entropy (`class_loss`);
    and the number of its images, 0 where only the loss knows.

    Tensors are brought to the network's device (images to its floating-point type too); what is there is not copied. Raises DataError
    for batches of another form, where there is none (an iterator that was used up before), and for losses that are no scalars.
    """
    if not isinstance(data, WithLoss):
        for x, y in labelled(data, model):
            yield (lambda x=x, y=y: class_loss(_scores(model, x), y)), len(x)  # type: ignore[misc]
        return
    like = next(model.parameters(), None)
    found = False
    for number, batch in enumerate(data, data.first):
        found = True
        here = batch if like is None else to_device(batch, like.device)
        yield functools.partial(_finite_loss, data.loss, model, here, number), 0
    if not found:
        raise DataError(_EMPTY)


def loss_parts(data: Batches, model: nn.Module) -> Iterator[list[tuple[Callable[[], Tensor], int]]]:
    """`each_loss`, each batch in parts whose losses add up to its own, with the number of images of each: of PART pixels, or one image. A
    loss that came with the data is one part."""
    if isinstance(data, WithLoss):
        yield from ([whole] for whole in each_loss(data, model))
        return

    def loss_of(x: Tensor, y: Tensor, count: int) -> Tensor:
        return class_loss(_scores(model, x), y) * (len(x) / count)

    for x, y in labelled(data, model):
        at_once = max(1, PART // max(1, math.prod(x.shape[2:])))  # of no pixels: `_scores` refuses
        parts = zip(x.split(at_once), y.split(at_once), strict=True)
        yield [(functools.partial(loss_of, *part, len(x)), len(part[0])) for part in parts]


def network_inputs(data: Batches, model: nn.Module) -> Iterator[Tensor]:
    """The images that the network itself reads from each batch; no layer of it runs. Raises DataError where a loss calls the network with
    anything but one tensor, or not at all."""
    if not isinstance(data, WithLoss):
        yield from (x for x, _ in labelled(data, model))
        return

    def stop(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _Reached(inputs, named)

    for run in each_pass(data, model):
        try:
            with model.register_forward_pre_hook(stop, with_kwargs=True):
                run()
        except _Reached as reached:
            inputs, named = reached.args
        else:
            raise DataError(NOT_RUN)
        if len(inputs) != 1 or named or not isinstance(inputs[0], Tensor):
            called = ", ".join([*map(_said, inputs), *(f"{name}=" for name in named)])
            raise DataError(
                f"loss: it calls the network with ({called}); call it with one tensor, model(images): of several inputs make one "
                "(torch.cat), and take it apart in forward"
            )
        yield inputs[0].detach()


def _scores(model: nn.Module, x: Tensor) -> Any:
    """What the network says of images. Raises DataError where it does not take them."""
    try:
        return on_copies(model, x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if loader_killed(error):
            raise
        raise DataError(
            f"data: the network fails on images of shape {tuple(x.shape)} ({first_line(error)}); give them as it was trained on them"
        ) from error


class _Reached(BaseException):
    """The loss calls the network: all that was to be known. No Exception, which a loss might catch."""


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of any form with its tensors on the device; what is there is not copied."""
    return tree_map_only(Tensor, lambda t: t.to(device), batch)


_EMPTY = "data holds no images (an iterator that was used up before?); pass a loader, or a list of batches"
NOT_RUN = "loss: it does not run the network that it is given; call model(images) in it"
OWN_LOSS = "pass loss=, a function of (model, batch) that returns a scalar tensor"


def _finite_loss(loss: Loss, model: nn.Module, batch: Any, number: int) -> Tensor:
    try:
        value = own_loss(loss, model, batch)
    except DataError as error:
        raise DataError(f"{error} (batch {number})") from error
    if not value.is_meta and not bool(value.isfinite()):
        where = broken_tensor(model)
        raise DataError(f"loss: it is {float(value.detach())} on batch {number}{f' ({where})' if where else ''}")
    return value


def own_loss(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    """The loss as a tensor of no dimensions, computed on a copy of the batch: network and loss may write over theirs. Raises DataError
    where it fails, or is nothing that can be minimised."""
    try:
        value = loss(model, tree_map_only(Tensor, torch.clone, batch))
    except DataError:
        raise
    except Exception as error:
        if loader_killed(error):
            raise
        raise DataError(
            f"loss: failed ({type(error).__name__}: {first_line(error)}); it is called as loss(model, batch), where a batch is "
            f"{_described(batch)}, and returns a scalar tensor"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        what = f"a {value.dtype} tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"loss: it returns {what}; return one number as a tensor, for example the mean over the images")
    if torch.is_grad_enabled() and not value.requires_grad:
        raise DataError("loss: no gradient goes through it; compute it from model(...) without detach, item or no_grad")
    return value.reshape(())


def labelled(data: Batches, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of each batch, on the network's device, images in its floating-point type. Raises DataError as `each_loss` does."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    found = False
    for batch in data:
        x, y = _pair(batch)
        if len(x) == 0:
            continue
        found = True
        yield (x, y) if like is None else (x.to(like.device, like.dtype), y.to(like.device))
    if not found:
        raise DataError(_EMPTY)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    parts = list(batch) if isinstance(batch, tuple | list) else []
    if len(parts) < 2 or not all(isinstance(part, Tensor) and part.dim() for part in parts[:2]):
        raise DataError(
            f"data: a batch is {_described(batch)}; give (images, labels), for example ((b['image'], b['label']) for b in loader) as a "
            f"list, or {OWN_LOSS}"
        )
    x, y = parts[:2]
    if not x.is_floating_point():
        raise DataError(f"data: images are {x.dtype}; give them normalised, as the network was trained on them")
    if any(part.layout != torch.strided or part.is_nested for part in (x, y)):
        raise DataError(
            "data: a batch holds sparse or nested tensors; give dense ones (to_dense(), or one size for all)"
        )
    if len(x) != len(y):
        raise DataError(f"data: a batch has {len(x)} images and {len(y)} labels; {OWN_LOSS}, where these are no labels")
    return x, y


def _described(batch: Any) -> str:
    if isinstance(batch, dict):
        return f"a dict of {', '.join(map(str, batch))}"
    return f"({', '.join(map(_said, batch[:4]))})" if isinstance(batch, tuple | list) and batch else _said(batch)


def _said(value: Any) -> str:
    return f"a tensor of sizes {list(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"


def class_loss(outputs: Any, labels: Tensor) -> Tensor:
    """The mean cross entropy of outputs [N, classes, ...] with class numbers [N, ...], or with probabilities [N, classes, ...].

    Raises DataError where the network or the labels are no classifier's.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or outputs.shape[1] < 2:
        what = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(
            f"without a loss the network must give one score a class, [N, classes, ...], not {what}; {OWN_LOSS}"
        )
    if labels.shape == outputs.shape and labels.is_floating_point():
        return F.cross_entropy(outputs, labels)
    if labels.is_floating_point() or labels.dim() != outputs.dim() - 1:
        raise DataError(
            f"data: labels are {labels.dtype} of shape {tuple(labels.shape)}, not class numbers [N]; {OWN_LOSS}"
        )
    check_labels(labels, outputs.shape[1])
    return F.cross_entropy(outputs, labels.long())


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise DataError for class numbers below 0 or beyond the network's `classes`; waits for a GPU that holds them."""
    least, most = (0, 0) if labels.is_meta or not labels.numel() else (int(labels.min()), int(labels.max()))
    if least < 0 or most >= classes:
        raise DataError(f"data: labels from {least} to {most}, but the network has {classes} classes")
