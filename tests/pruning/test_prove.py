"""A cut is proved: right ones pass, and every way of getting one wrong is found and named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from marks import few
from torch import Tensor, nn

from rmprune.artifact import load, save
from rmprune.errors import NotEquivalent, UnsupportedModel
from rmprune.models import create
from rmprune.pruning import Budget, coupled, find_structure, prunable, prune, prune_coupled
from rmprune.pruning.collapse import collapse_blocks
from rmprune.pruning.groups import Structure
from rmprune.pruning.prove import prove_cut, prove_groups
from rmprune.pruning.surgery import take


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


@pytest.mark.parametrize("name", few(["resnet8", "mobilenet_v2", "repvgg"], "resnet8"))
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


def test_a_cut_that_silences_the_network_is_proved_by_half_of_it() -> None:
    model = chain()
    model[1].bias.data[::4] = -1e3  # type: ignore[operator,index]
    structure = find_structure(model, IMAGES)
    wrong = changed(structure, "0", lambda m: replace(m, index=m.index.flip(0)) if m.side == "in" else m)
    keep = {"0": torch.tensor([True, False, False, False])}
    assert prove_cut(model, structure, keep, IMAGES) < 1e-12
    with pytest.raises(NotEquivalent, match=r"^0: "):
        prove_cut(model, wrong, keep, IMAGES)


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


def test_prune_proves_its_cut_and_leaves_it_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_structure(chain(), IMAGES)
    wrong = changed(found, "0", lambda m: replace(m, index=m.index.flip(0)) if m.side == "in" else m)
    monkeypatch.setattr(prunable, "find_structure", lambda *_, **__: wrong)
    table = {"0": torch.tensor([4.0, 3.0, 2.0, 1.0]), "3": torch.ones(4), "5": torch.ones(6)}
    cut = {"importance": table, "budget": Budget(ratio=0.2), "compensate": False, "rank": "importance"}
    with pytest.raises(NotEquivalent, match=r"^0: .*a fault"):
        prune(chain(), IMAGES, **cut)
    assert prune(chain(), IMAGES, **cut, prove=False)[0].out_channels < 8


class Flipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)).flip(1))))


def test_torch_pruning_goes_through_the_same_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the channels behind a flip for those before it; our own filter of such groups is taken away here."""
    torch.manual_seed(0)
    model = Flipped().eval()
    monkeypatch.setattr(coupled, "_without_unfollowed", lambda model, structure: structure)
    with pytest.raises(NotEquivalent, match=r"^Torch-Pruning's cut: the smaller network differs"):
        prune_coupled(model, IMAGES, importance="magnitude", budget=Budget(ratio=0.4))


@pytest.mark.parametrize("name", few(["resnet8", "mobilenet_v2"], "resnet8"))
def test_what_torch_pruning_left_is_told_from_its_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = create(name, num_classes=5, **({} if name == "resnet8" else {"small_images": True, "width": 0.25})).eval()
    seen = []
    real = coupled.prove_slices
    monkeypatch.setattr(coupled, "prove_slices", lambda *args: seen.append((args[1], args[2], real(*args))))
    pruned = prune_coupled(model, torch.randn(2, 3, 16, 16), importance="batch_norm", budget=Budget(ratio=0.4))
    ((smaller, slices, error),) = seen
    assert smaller is pruned and error < 1e-12
    whole, left = model.state_dict(), pruned.state_dict()
    cut = {name for name in left if left[name].shape != whole[name].shape}
    assert cut and cut == set(slices)
    assert all(torch.equal(take(whole[name], slices.get(name, ())), left[name]) for name in left)
    assert {value.dtype for value in left.values() if value.dim()} == {torch.float32}


def test_other_names_of_a_value_that_is_changed_in_place_see_the_change(tmp_path: Path) -> None:
    """torch.fx alone takes `z += ...` for `z = z + ...`, where y would keep its old value."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.h = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = y
            z += self.b(x)
            z *= 2
            z **= 2
            z %= 3
            return self.h(y)

    torch.manual_seed(0)
    model = Named().eval()
    assert prove_groups(model, find_structure(model, IMAGES), IMAGES) < 1e-12
    assert torch.equal(load(save(model, tmp_path / "named"))(IMAGES), model(IMAGES))


def shifted(_: nn.Module, __: object, y: Tensor) -> Tensor:
    return y.roll(1, 1)


@pytest.mark.parametrize("at", ["", "0", "2"])
def test_hooks_that_change_values_are_refused(at: str) -> None:
    model = chain()
    model.get_submodule(at).register_forward_hook(shifted)
    for call in (
        lambda: prune(model, IMAGES, importance="magnitude", budget=Budget(ratio=0.3)),
        lambda: prune_coupled(model, IMAGES, importance="magnitude", budget=Budget(ratio=0.3)),
        lambda: collapse_blocks(model, IMAGES),
    ):
        with pytest.raises(UnsupportedModel, match="a forward hook changes what the network returns"):
            call()


@pytest.mark.parametrize("end", ["zeros", "class numbers"])
def test_a_head_that_tells_nothing_hides_no_wrong_cut(end: str) -> None:
    model = chain()
    if end == "zeros":
        nn.init.zeros_(model[7].weight)
    else:
        model.append(Largest())
    structure = find_structure(model, IMAGES)
    wrong = changed(structure, "0", lambda m: replace(m, index=m.index.flip(0)) if m.side == "in" else m)
    keep = {"0": torch.tensor([True, False, False, False])}
    assert prove_cut(model, structure, keep, IMAGES) < 1e-12
    with pytest.raises(NotEquivalent, match="the smaller network differs"):
        prove_cut(model, wrong, keep, IMAGES)


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)
