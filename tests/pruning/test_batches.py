"""Data as loaders give it: read where it is what it should be, refused by name where it is not, before anything is cut."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmprune
from rmprune.errors import DataError

IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3


def classifier(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)).eval()


def pruned(data: Any, importance: str = "taylor", net: nn.Module | None = None) -> nn.Module:
    budget = rmprune.Budget(ratio=0.3)
    return rmprune.prune(net or classifier(), IMAGES[:2], importance=importance, data=data, budget=budget)


def test_longer_tuples_lists_and_other_number_types_are_read() -> None:
    expected = pruned([(IMAGES, LABELS)])(IMAGES)
    for data in (
        [(IMAGES, LABELS, LABELS)],
        [[IMAGES, LABELS.int()]],
        [(IMAGES.double(), LABELS)],
        iter([(IMAGES, LABELS)]),
    ):
        assert torch.allclose(pruned(data)(IMAGES), expected, atol=1e-6)


def test_probabilities_are_labels_too() -> None:
    one_hot = nn.functional.one_hot(LABELS, 3).float()
    assert torch.allclose(pruned([(IMAGES, one_hot)])(IMAGES), pruned([(IMAGES, LABELS)])(IMAGES), atol=1e-6)


@pytest.mark.parametrize("importance", ["taylor", "taylor_squared", "activation"])
def test_data_without_images_is_refused(importance: str) -> None:
    used_up = iter([(IMAGES, LABELS)])
    list(used_up)
    for data in (used_up, [], [(IMAGES[:0], LABELS[:0])]):
        with pytest.raises(DataError, match="no images"):
            pruned(data, importance)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([{"image": IMAGES, "label": LABELS}], "a batch is a dict of image, label"),
        ([IMAGES], "a batch is of type Tensor"),
        ([(IMAGES, LABELS[:3])], "8 images and 3 labels"),
        ([((IMAGES * 50).byte(), LABELS)], "images are torch.uint8"),
        ([(IMAGES, LABELS + 7)], "labels from 7 to 9, but the network has 3 classes"),
        ([(IMAGES, LABELS - 1)], "labels from -1"),
        ([(IMAGES, LABELS.float())], "labels are torch.float32"),
    ],
)
def test_other_forms_are_refused_by_name(data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        pruned(data)
    with pytest.raises(DataError, match=said):
        rmprune.pruning.prune_coupled(
            classifier(), IMAGES[:2], importance="taylor", data=data, budget=rmprune.Budget(ratio=0.3)
        )


def test_a_network_of_one_output_has_no_cross_entropy() -> None:
    """Its loss would be 0 whatever the weights, and channels would go by chance."""
    with pytest.raises(DataError, match="one score a class"):
        pruned([(IMAGES, torch.randn(8, 1))], net=classifier(classes=1))


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.net(x)


def test_scores_that_tell_nothing_apart_are_refused() -> None:
    with pytest.raises(DataError, match="every score is 0"):
        pruned([(IMAGES, LABELS)], net=Silent().eval())


def test_maps_of_classes_are_ranked() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    labels = torch.randint(0, 4, (8, 10, 10))
    assert pruned([(IMAGES, labels)], net=net)[0].out_channels < 16
