"""Batches that somebody else's loader gives, as a `Split` that training reads. Shuffles, augments and normalises nothing."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from rmprune.data.batches import (
    OWN_LOSS,
    Batches,
    Loss,
    WithLoss,
    check_labels,
    each_loss,
    labelled,
    network_inputs,
    to_device,
)
from rmprune.data.splits import Batch, Split
from rmprune.errors import ConfigError, DataError, first_line
from rmprune.graph.finite import broken_on
from rmprune.graph.run import on_copies

NOT_FINITE = "there are images that are not finite; mend them or leave them out"
GIVEN = "given"  # how the name of such data begins in config and record; what they hold is the rest


class GivenSplit(Split):
    """The batches of `loader`, in its order, of its size: (images [B, ...], labels [B], ...), or with a `loss` of any form.

    A loader that shuffles or augments is made to repeat itself: the generators that it draws from are seeded for the while (`_Draws`).
    Batches are (x, y): images and labels on the device, or with a loss what `model` reads, and the whole batch. `name`: in errors.

    Raises DataError at once for a loader that can be read only once or is empty, and for a first batch that the loss cannot use.
    """

    def __init__(self, loader: Iterable[Any], model: nn.Module, loss: Loss | None, name: str) -> None:
        self.loader, self.model, self.loss, self.name = _repeatable(loader), model, loss, name
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator | Tensor | str | dict):
            raise DataError(
                f"{name} is of type {type(loader).__name__}; give a DataLoader or a list of batches: it is read many times"
            )
        first = next(self._read(0), None)
        if first is None:
            raise DataError(f"{name} holds no batch")
        try:
            ((run, _),) = each_loss(self._as_given(first), model)
            with torch.enable_grad():
                value = run()
            self.classes = self._classes(first)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise DataError(f"{name}: the network cannot be run on the first batch ({first_line(error)})") from error
        if not bool(value.isfinite()):  # a loss that came with the data says so itself
            where = broken_on(model, next(network_inputs([first], model)))
            said = f" ({where})" if where else ""
            raise DataError(f"{name}: the loss of the model is {float(value.detach())} on the first batch{said}")
        try:
            self.count = len(loader)  # type: ignore[arg-type]
        except TypeError:  # it has none; neither has a DataLoader of a stream
            self.count = sum(1 for _ in self._read(0))
        self._first: Tensor | None = None
        self._images: int | None = None

    def digest(self) -> str:
        """Of all images and labels (or what else the batches hold), to tell other data from these. Reads every batch, and raises DataError
        for one on which a loss of one's own fails or is no finite number."""
        return _digest(self._tried())

    def first_digest(self) -> str:
        """Of the first batch as it comes; "" where two readings differ, as of images augmented by a generator of their own."""
        one, other = (_digest(itertools.islice(self._read(0), 1)) for _ in range(2))
        return one if one == other else ""

    def first_loss(self) -> float | None:
        """The network's loss on the first batch; None where it differs when it is computed again, as one that draws numbers may."""
        ((run, _),) = each_loss(self._as_given(next(self._read(0))), self.model)
        found = set()
        for _ in range(2):
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found.add(float(run()))
        return found.pop() if len(found) == 1 else None

    def __len__(self) -> int:
        if self._images is None:
            self._images = sum(len(x) for x, _ in self.batches(1))
        return self._images

    def num_batches(self, batch_size: int, *, shuffled: bool) -> int:
        return self.count

    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", shuffle_seed: int | None = None,
        augment: bool = False, memory_format: torch.memory_format = torch.contiguous_format, start: int = 0,
        shard: tuple[int, int] = (0, 1), limit: int | None = None,
    ) -> Iterator[Batch]:  # fmt: skip
        if shard != (0, 1):
            raise ConfigError("batches of one's own loader are not divided among processes; train in one")
        seen, number = 0, start
        for batch in itertools.islice(self._read(shuffle_seed or 0), start, self.count):
            x, y = self._pair(batch, number, torch.device(device))
            if limit is not None and self.loss is None:
                x, y = x[: limit - seen], y[: limit - seen]
            yield x.contiguous(memory_format=memory_format) if x.dim() == 4 else x, y
            seen, number = seen + len(x), number + 1
            if limit is not None and seen >= limit:
                return
        if number < self.count:
            raise DataError(
                f"{self.name} gave {number} batches where it said {self.count}; it must give as many each time"
            )

    def example(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        if self._first is None or len(self._first) < n:
            found = [x for x, _ in self.batches(n, limit=n)]
            if len(sizes := {tuple(x.shape[1:]) for x in found}) > 1:
                raise DataError(
                    f"{self.name}: images of several sizes, {', '.join(map(str, sorted(sizes)))}; give them one"
                )
            self._first = torch.cat(found)
            if not bool(self._first.isfinite().all()):
                raise DataError(f"{self.name}: {NOT_FINITE}")
        return self._first[:n].to(device)

    def _tried(self) -> Iterator[Batch]:
        """Each batch, after the loss was computed on it."""
        for number, (x, y) in enumerate(self.batches(1)):
            if self.loss is not None:
                ((run, _),) = each_loss(self._as_given(y, number), self.model)
                with self._named(), torch.no_grad():
                    run()
            yield x, y

    def _read(self, seed: int) -> Iterator[Any]:
        """The loader's batches. What it draws, for its order and while it reads, is a stream of its own: the same from the first batch on,
        whatever is drawn between them."""
        draws = _Draws(self.loader, seed)
        with draws:
            iterator = iter(self.loader)
        while True:
            with draws:
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    @contextlib.contextmanager
    def _named(self, where: str = "") -> Iterator[None]:
        """Says in errors whose batches they are of."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.name}: {where}{error}") from None

    def _as_given(self, batch: Any, number: int = 0) -> Batches:
        return [batch] if self.loss is None else WithLoss([batch], self.loss, number)

    def _pair(self, batch: Any, number: int, device: torch.device) -> Batch:
        if self.loss is None:
            with self._named(f"batch {number}: "):
                ((x, y),) = labelled([batch], self.model)
                check_labels(y, self.classes)
                if not bool(x.isfinite().all()):
                    raise DataError(NOT_FINITE)
            return x.to(device), y.to(device, torch.int64)
        with self._named():
            (x,) = network_inputs(self._as_given(batch, number), self.model)
        return x.to(device), to_device(batch, device)

    def _classes(self, batch: Any) -> int:
        """What the network tells apart; 0 where it is no classifier. Raises DataError where a class is not a number for each image."""
        if self.loss is not None:
            return 0
        ((x, y),) = labelled([batch], self.model)
        with torch.no_grad():
            outputs = on_copies(self.model, x[:1])
        if outputs.dim() != 2 or y.dim() != 1 or y.is_floating_point():
            raise DataError(
                f"labels are {y.dtype} of shape {tuple(y.shape)} for outputs {tuple(outputs.shape)}; without a loss they are class "
                f"numbers [N] for [N, classes]; {OWN_LOSS}"
            )
        return int(outputs.shape[1])


class _Draws:
    """What a loader draws from: Python's, numpy's and torch's global generators, and those that a DataLoader and its samplers were given.

    Entered, they are seeded the first time, and later go on from where they were left; afterwards they are what they were before.
    """

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        batch_sampler = getattr(loader, "batch_sampler", None)
        holders = (loader, batch_sampler, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        self.seed = seed
        self.generators = [torch.default_generator, *(own for own in found if isinstance(own, torch.Generator))]
        self.inside: list[Any] = []

    def __enter__(self) -> None:
        self.outside = self._states()
        if self.inside:
            self._restore(self.inside)
            return
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)  # noqa: NPY002
        for generator in self.generators:
            generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        self.inside = self._states()
        self._restore(self.outside)

    def _states(self) -> list[Any]:
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002
        return [random.getstate(), numpy, *(generator.get_state() for generator in self.generators)]

    def _restore(self, states: list[Any]) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for generator, state in zip(self.generators, states[2:], strict=True):
            generator.set_state(state)


def _repeatable(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader, or a copy of a DataLoader, whose workers begin with each pass, which seeds them, and give the batches in their order."""
    if not isinstance(loader, DataLoader):
        return loader
    found = copy.copy(loader)
    # A DataLoader refuses to be assigned to.
    vars(found).update(persistent_workers=False, in_order=True, _iterator=None)
    return found


def _digest(batches: Iterable[Any]) -> str:
    """Of all that batches hold; of an object without a text of its own its type alone, as its place in memory is another each time."""
    found = hashlib.sha256()
    for value in itertools.chain.from_iterable(map(tree_leaves, batches)):
        held = value.detach().cpu().contiguous() if isinstance(value, Tensor) else None
        said = re.sub(r" at 0x[0-9a-f]+", "", repr(value)) if held is None else repr((held.dtype, held.shape))
        found.update(said.encode())
        found.update(b"" if held is None else held.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:8]
