"""Surgery: what stays computes what it did, momentum is cut along, the argument is left alone."""

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import chain, images, mobile_chain, residual
from torch import nn

from rmprune.errors import UnsupportedModel
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Keep, Structure, layer_masks
from rmprune.pruning.surgery import shrink


def random_keep(structure: Structure, seed: int = 0) -> Keep:
    generator = torch.Generator().manual_seed(seed)
    keep = {g.name: torch.rand(g.units, generator=generator) < 0.6 for g in structure.groups}
    for mask in keep.values():
        mask[0] = True
    return keep


def silence(model: nn.Module, structure: Structure, keep: Keep) -> None:
    """Zero what the removed channels' readers weigh: the full network then computes what the cut one should."""
    masks = layer_masks(structure, keep)
    for (name, side), mask in masks.items():
        module = model.get_submodule(name)
        if side == "in" and isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "groups", 1) != len(mask):
            columns = mask.view(getattr(module, "groups", 1), -1)[0]
            module.weight.data[:, ~columns] = 0


@pytest.mark.parametrize("build", [chain, mobile_chain, residual])
def test_the_cut_network_computes_what_is_left(build: object) -> None:
    model, x = build(), images(3)  # type: ignore[operator]
    structure = find_structure(model, x)
    keep = random_keep(structure)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    smaller, optimizer = shrink(model, keep, structure)
    assert optimizer is None
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    silence(model, structure, keep)
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("build", [chain, residual])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimiser_state_is_cut_with_the_parameters(build: object, kind: type) -> None:
    """One step of the cut network equals the step of the full one whose removed channels are silenced."""
    model, x = build().train(), images(4)  # type: ignore[operator]
    model.eval()
    structure = find_structure(model, x)
    extra = {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {}
    decayed = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 1e-2}, {"params": free, "weight_decay": 0.0}]
    optimizer = kind(groups, lr=0.05, **extra)
    y = torch.tensor([0, 1, 2, 3])
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    keep = random_keep(structure)
    smaller, cut = shrink(model, keep, structure, optimizer)
    assert cut is not None and cut is not optimizer and type(cut) is kind
    assert [len(g["params"]) for g in cut.param_groups] == [len(decayed), len(free)]
    assert cut.param_groups[0]["weight_decay"] == 1e-2
    assert {id(p) for g in cut.param_groups for p in g["params"]} == {id(p) for p in smaller.parameters()}
    for parameter, state in cut.state.items():
        assert all(v.shape == parameter.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    silence(model, structure, keep)
    for net, opt in ((model, optimizer), (smaller, cut)):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    expected, _ = shrink(model, keep, structure)
    for (name, a), b in zip(smaller.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_what_a_loop_puts_on_parameters_follows() -> None:
    """Hooks of gradients and attributes; a network that is cut outside of a training begins without, as copies do in torch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    seen: list[torch.Size] = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad * 0.5)
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.shape))
        parameter.no_decay = True
    structure = find_structure(model, torch.randn(1, 2, 4, 4))
    (group,) = structure.groups
    keep = {group.name: torch.arange(6) < 4}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    smaller, _ = shrink(model, keep, structure, optimizer)
    plain, _ = shrink(model, keep, structure)
    x = torch.randn(2, 2, 4, 4)
    smaller(x).sum().backward()
    plain(x).sum().backward()
    for own, other in zip(smaller.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own.grad, 0.5 * other.grad) and own.no_decay and not hasattr(other, "no_decay")
    assert sorted(seen) == sorted(p.shape for p in smaller.parameters())


def test_memory_format_gradients_and_frozen_parameters_stay() -> None:
    model = chain().to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    x = images()
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    structure = find_structure(model, x)
    keep = random_keep(structure)
    smaller, _ = shrink(model, keep, structure)
    assert not smaller[0].weight.requires_grad and smaller[3].weight.requires_grad
    assert smaller[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(smaller[3].weight.grad, model[3].weight.grad[keep["3"]][:, keep["0"]])
    assert (smaller[3].out_channels, smaller[3].in_channels) == (int(keep["3"].sum()), int(keep["0"].sum()))
    assert smaller[4].num_features == int(keep["3"].sum())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nowhere": torch.ones(3, dtype=torch.bool)}, "no prunable group"),
        ({"0": torch.ones(7, dtype=torch.bool)}, "bool mask of 8"),
        ({"0": torch.ones(8)}, "bool mask of 8"),
        ({"0": torch.zeros(8, dtype=torch.bool)}, "leave at least one"),
    ],
)
def test_wrong_masks_are_refused(keep: Keep, message: str) -> None:
    model = chain()
    with pytest.raises(UnsupportedModel, match=message):
        shrink(model, keep, find_structure(model, images()))
