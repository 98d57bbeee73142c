"""The groups of networks that Torch-Pruning can follow are the groups that it finds: same channels, names and order."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torchvision
from marks import few
from pruning_nets import chain, mobile_chain, residual
from torch import Tensor, nn
from torch_pruning_reader import dependency_structure
from torchvision.models import DenseNet, ResNet
from torchvision.models.resnet import Bottleneck

import rmprune
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Structure
from rmprune.pruning.layers import SizedLayer

QUIET = {"googlenet": {"init_weights": False, "aux_logits": False}}
THEIRS = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "googlenet", "squeezenet1_1", "regnet_y_400mf")
SHORT = {  # one block of each stage: resnet50, resnext50_32x4d, densenet121
    "bottlenecks": partial(ResNet, Bottleneck, [1, 1, 1, 1]),
    "grouped": partial(ResNet, Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4),
    "dense": partial(DenseNet, 8, (2, 2, 2, 2), 16),
}
OURS = ("resnet20", "preact_resnet20", "repvgg13", "rmnext41x5_16")


def units(structure: Structure) -> set[frozenset[tuple[str, str, int]]]:
    """What goes at once: {(layer, side, channel), ...} of every unit."""
    return {
        frozenset((m.layer, m.side, c) for m in group.members for c in m.index[unit].tolist())
        for group in structure.groups
        for unit in range(group.units)
    }


def bare(structure: Structure) -> list[SizedLayer]:
    return [replace(layer, inputs=(), outputs=()) for layer in structure.layers]


def assert_same(model: nn.Module, x: Tensor, *, named: bool) -> None:
    ours, theirs = find_structure(model, x), dependency_structure(model, x)
    assert units(ours) == units(theirs)
    assert set(ours.frozen) == set(theirs.frozen)
    assert set(bare(ours)) == set(bare(theirs))
    if named:  # a chain's groups are named and ordered from front to back
        assert ours.units == theirs.units and list(ours.units) == list(theirs.units)


@pytest.mark.parametrize("name", few(THEIRS, "resnet18"))
def test_torchvision(name: str) -> None:
    model = getattr(torchvision.models, name)(weights=None, num_classes=7, **QUIET.get(name, {})).eval()
    size = 64 if name in ("googlenet", "squeezenet1_1") else 32
    assert_same(model, torch.zeros(1, 3, size, size), named=True)


@pytest.mark.parametrize("name", SHORT)
def test_short_ones(name: str) -> None:
    assert_same(SHORT[name](num_classes=7).eval(), torch.zeros(1, 3, 32, 32), named=True)


@pytest.mark.parametrize("name", few(OURS, "preact_resnet20"))
def test_our_own(name: str) -> None:
    assert_same(rmprune.models.create(name, num_classes=7).eval(), torch.zeros(1, 3, 32, 32), named=True)


@pytest.mark.parametrize("build", [chain, mobile_chain, residual])
def test_small_ones(build: object) -> None:
    assert_same(build(), torch.zeros(2, 3, 8, 8, dtype=torch.float64), named=build is residual)  # type: ignore[operator]
