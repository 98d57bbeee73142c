"""Batches of somebody else's loader as a split: its order repeats itself, its counts are held to, nothing else is done to them."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from rmprune.data.given import GivenSplit
from rmprune.errors import DataError

MODEL = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
X, Y = torch.randn(10, 3, 2, 2), torch.arange(10) % 5


def images(split: GivenSplit, seed: int) -> Tensor:
    return torch.cat([x for x, _ in split.batches(99, shuffle_seed=seed)])


def test_a_shuffling_loader_repeats_itself_and_leaves_the_generator_alone() -> None:
    split = GivenSplit(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True), MODEL, None, "train")
    torch.manual_seed(3)
    first, drawn = images(split, 1), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(images(split, 1), first) and not torch.equal(images(split, 2), first)
    assert torch.equal(first.sort(0).values, X.sort(0).values)
    rest = torch.cat([x for x, _ in split.batches(99, shuffle_seed=1, start=1)])
    assert torch.equal(rest, first[4:]) and split.num_batches(99, shuffled=True) == 3 and len(split) == 10


def test_limits_and_examples_go_over_batches() -> None:
    split = GivenSplit([(X[:2], Y[:2], "more"), [X[2:7], Y[2:7]], (X[7:], Y[7:])], MODEL, None, "train")
    assert torch.equal(split.example(5), X[:5]) and torch.equal(split.example(1), X[:1])
    assert [len(x) for x, _ in split.batches(99, limit=3)] == [2, 1] and split.classes == 5
    whole = GivenSplit([{"x": X}], MODEL, lambda model, batch: model(2 * batch["x"]).mean(), "train")
    (x, y) = next(whole.batches(99, limit=3))
    assert torch.equal(x, 2 * X) and y["x"] is X and whole.classes == 0  # what the network reads, and the whole batch


@pytest.mark.parametrize(
    ("weight", "pixel", "where"), [(1.0, torch.nan, "the images are"), (torch.inf, 1.0, "1.weight is")]
)
def test_a_first_loss_that_is_no_number_says_where_that_begins(weight: float, pixel: float, where: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    nn.init.constant_(model[1].weight, weight)
    with pytest.raises(
        DataError, match=rf"train: the loss of the model is nan on the first batch \({where} not finite\)"
    ):
        GivenSplit([(torch.full_like(X, pixel), Y)], model, None, "train")


def test_a_loss_that_came_with_the_data_names_the_weights_that_are_no_numbers() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    nn.init.constant_(model[1].weight, torch.inf)
    with pytest.raises(DataError, match=r"train: loss: it is nan on batch 0 \(1.weight is not finite\)"):
        GivenSplit(
            [(X, Y)], model, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), "train"
        )


class Shrinking:
    """Says three batches, and gives fewer from the second pass on."""

    passes = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield from [(X, Y)] * (3 if self.passes == 1 else 2)


def test_a_loader_that_gives_less_than_it_says_is_refused() -> None:
    split = GivenSplit(Shrinking(), MODEL, None, "train")
    with pytest.raises(DataError, match="train gave 2 batches where it said 3"):
        images(split, 0)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(X, Y, strict=True)


def test_a_stream_is_counted() -> None:
    split = GivenSplit(DataLoader(Stream(), batch_size=4), MODEL, None, "train")
    assert split.num_batches(4, shuffled=True) == 3 and len(split) == 10


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([(X, Y), (X, Y + 3)], r"^test: batch 1: data: labels from 3 to 7, but the network has 5 classes"),
        ([(X[:, :2], Y)], r"^test: data: the network fails on images of shape"),
        (
            list(zip(X, Y, strict=True)),
            r"^test: data: a batch is \(a tensor of sizes .*, a tensor of sizes \[\]\); give",
        ),
        ([(X, Y.tolist())], r"^test: data: a batch is \(a tensor of sizes .*, of type list\); give"),
    ],
)
def test_every_batch_is_looked_at(batches: list[tuple[Tensor, Tensor]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        GivenSplit(batches, MODEL, None, "test").digest()


def test_examples_of_several_sizes_are_refused() -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)).eval()
    split = GivenSplit([(X[:2], Y[:2]), (torch.randn(2, 3, 4, 4), Y[:2])], net, None, "train")
    assert split.example(2).shape == (2, 3, 2, 2)
    with pytest.raises(DataError, match=r"^train: images of several sizes"):
        split.example(3)


def test_images_that_are_not_finite_are_named() -> None:
    split = GivenSplit([(X[:4], Y[:4]), (X[4:] / 0, Y[4:])], MODEL, None, "train")
    with pytest.raises(DataError, match=r"^train: batch 1: there are images that are not finite"):
        split.example(10)


def test_a_network_of_several_inputs_needs_a_loss() -> None:
    with pytest.raises(DataError, match=r"^train: the network cannot be run on the first batch"):
        GivenSplit([(X, Y)], nn.Bilinear(4, 4, 3), None, "train")


class Noisy(TensorDataset):
    """Draws while an image is read, as transforms do."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_a_loader_draws_is_the_same_from_any_batch_on(shuffle: bool) -> None:
    """Whatever training draws between two batches; and the generator of training is left alone."""
    split = GivenSplit(DataLoader(Noisy(X, Y), batch_size=2, shuffle=shuffle), MODEL, None, "train")
    whole = images(split, 1)
    torch.manual_seed(3)
    found = []
    for x, _ in split.batches(99, shuffle_seed=1):
        found.append(x)
        torch.rand(7)
    drawn = torch.rand(1)
    assert torch.equal(torch.cat(found), whole) and not torch.equal(images(split, 2), whole)
    assert torch.equal(torch.cat([x for x, _ in split.batches(99, shuffle_seed=1, start=3)]), whole[6:])
    torch.manual_seed(3)
    torch.rand(7 * 5)
    assert torch.equal(drawn, torch.rand(1))


class Drawn(TensorDataset):
    """Brightened by what each global generator draws."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return torch.stack([x[0] + random.random(), x[1] + np.random.rand(), x[2] + torch.rand(())]), y  # noqa: NPY002


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"generator": torch.Generator()},
        {"sampler": RandomSampler(X, generator=torch.Generator())},
        {"num_workers": 1, "persistent_workers": True},
    ],
    ids=lambda given: "-".join(given),
)
def test_augmented_batches_repeat_themselves_and_leave_the_generators_alone(given: dict[str, Any]) -> None:
    split = GivenSplit(
        DataLoader(Drawn(X, Y), batch_size=4, shuffle="sampler" not in given, **given), MODEL, None, "train"
    )
    before = random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    first = images(split, 1)
    assert not torch.equal(images(split, 2), first) and torch.equal(images(split, 1), first)
    assert torch.equal(torch.cat([x for x, _ in split.batches(99, shuffle_seed=1, start=2)]), first[8:])
    assert before == (random.getstate(), repr(np.random.get_state()))  # noqa: NPY002


def test_images_are_counted_once() -> None:
    loader = Counted([(X[:4], Y[:4]), (X[4:], Y[4:])])
    split = GivenSplit(loader, MODEL, None, "train")
    before = loader.passes
    assert [len(split) for _ in range(3)] == [10] * 3 and loader.passes == before + 1


class Counted(list[tuple[Tensor, Tensor]]):
    passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return super().__iter__()


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"x": X, "y": Y + 3}, r"^validation: loss: failed \(IndexError: Target .* \(batch 1\)"),
        ({"x": X}, r"^validation: loss: failed \(KeyError: 'y'.* \(batch 1\)"),
        ({"x": X / 0, "y": Y}, r"^validation: loss: it is nan on batch 1"),
    ],
)
def test_a_loss_of_one_s_own_is_computed_on_every_batch(second: dict[str, Tensor], reason: str) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    split = GivenSplit([{"x": X, "y": Y}, second], MODEL, loss, "validation")
    with pytest.raises(DataError, match=reason):
        split.digest()
