"""A cut is proved: right ones pass, and every way of getting one wrong is found and named."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rmprune.errors import NotEquivalent
from rmprune.models import create
from rmprune.pruning import find_structure
from rmprune.pruning.groups import Structure
from rmprune.pruning.prove import prove_cut, prove_groups


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 36, 4),
    ).eval()  # fmt: skip


def changed(structure: Structure, group: str, change) -> Structure:  # type: ignore[no-untyped-def]
    """The structure with `change(member)` in the place of each member of one group; None drops it."""
    groups = [
        replace(g, members=tuple(m for m in map(change, g.members) if m is not None)) if g.name == group else g
        for g in structure.groups
    ]
    return replace(structure, groups=tuple(groups))


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2", "repvgg"])
def test_right_cuts_pass(name: str) -> None:
    model = create(name, num_classes=5, small_images=True) if name != "resnet8" else create(name, num_classes=5)
    x = torch.randn(2, 3, 16, 16)
    assert prove_groups(model, find_structure(model, x), x) < 1e-12


def test_right_cuts_of_a_chain_pass_and_the_arguments_are_left_alone() -> None:
    model = chain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert prove_groups(model, find_structure(model, IMAGES), IMAGES) < 1e-12
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_other_columns_than_those_that_read_the_channels_are_found() -> None:
    structure = find_structure(chain(), IMAGES)
    wrong = changed(structure, "0", lambda m: replace(m, index=m.index.flip(0)) if m.side == "in" else m)
    keep = {"0": torch.tensor([True, False, False, False])}
    assert prove_cut(chain(), structure, keep, IMAGES) < 1e-12
    with pytest.raises(NotEquivalent, match=r"^0: the smaller network differs"):
        prove_cut(chain(), wrong, keep, IMAGES)


def test_the_group_at_fault_is_named() -> None:
    structure = find_structure(chain(), IMAGES)
    wrong = changed(structure, "5", lambda m: replace(m, index=m.index.roll(1, 0)) if m.side == "in" else m)
    with pytest.raises(NotEquivalent, match=r"^5: "):
        prove_groups(chain(), wrong, IMAGES)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.b(y) + y.amax((1, 2, 3), keepdim=True)


def test_a_reader_that_the_structure_does_not_know_is_found() -> None:
    """The largest value over all channels reads them, though no layer's columns do."""
    torch.manual_seed(0)
    model = TwoReaders().eval()
    with torch.no_grad():
        model.a.bias[4:] += 5.0
    keep = {"a": torch.arange(8) < 4}
    known = find_structure(nn.Sequential(model.a, nn.ReLU(), model.b), IMAGES)
    names = {"0": "a", "2": "b"}
    groups = tuple(
        replace(g, name=names[g.name], members=tuple(replace(m, layer=names[m.layer]) for m in g.members))
        for g in known.groups
    )
    with pytest.raises(NotEquivalent, match=r"^a: "):
        prove_cut(model, Structure(groups, known.layers, {}), keep, IMAGES)


def test_a_network_that_does_not_run_any_more_is_found() -> None:
    structure = find_structure(chain(), IMAGES)
    wrong = changed(structure, "0", lambda m: None if m.side == "in" else m)
    with pytest.raises(NotEquivalent, match="does not run"):
        prove_cut(chain(), wrong, {"0": torch.tensor([True, False, True, False])}, IMAGES)
