"""The coupled baseline: Torch-Pruning's own pruner on a network with its residuals, held to our budgets and limits.

Torch-Pruning 1.6.1 prunes a fraction of all groups' channels below one global threshold. It counts channels, not
MACs; it removes all channels that tie with the threshold; it rounds widths down after ranking; and in one shot
`max_pruning_ratio` is only looked at before the cut, so a layer may lose more. Hence the search for the ratio here;
one cut at a ratio is made by `torch_pruning_cut`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from rmprune.data.batches import Batches, Loss, loss_parts, with_loss
from rmprune.errors import ConfigError, InfeasibleBudget, UnsupportedModel
from rmprune.graph.copied import copied
from rmprune.graph.inputs import Inputs, as_given, only_input
from rmprune.graph.network import is_batch_norm
from rmprune.graph.run import evaluating
from rmprune.graph.tensors import device_of, own_tensors
from rmprune.graph.tf32 import tf32
from rmprune.pruning.allocate import explain, least_cost
from rmprune.pruning.budget import Budget, Target, allowed_widths, resolve
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Group, Structure, mask_of
from rmprune.pruning.importance import need_data
from rmprune.pruning.layers import Cost, Slices, in_and_out, output_dim, price
from rmprune.pruning.prove import check_outputs, prove_slices
from rmprune.pruning.refit import fitting, fitting_images, refit, refuse_no_images
from rmprune.pruning.surgery import note_cut, note_kept
from rmprune.pruning.torch_pruning_cut import COUPLED_IMPORTANCES, cut_at, following
from rmprune.training.convolutions import TrainableConvolutions

M = TypeVar("M", bound=nn.Module)


@tf32(False, "cuda")
@torch.inference_mode(False)  # what it makes can be trained
def prune_coupled(
    model: M,
    example_inputs: Inputs,
    *,
    importance: str = "batch_norm",
    isomorphic: bool = False,
    budget: Budget,
    data: Batches | None = None,
    loss: Loss | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    cost: Cost | None = None,
    origin: Mapping[str, int] | None = None,
    attempts: int = 14,
    prove: bool = True,
    reconstruct: bool = False,
) -> M:
    """A new network pruned globally by Torch-Pruning with its group-aware `importance` (batch_norm, taylor,
    magnitude).

    `isomorphic`: channels are ranked among those of groups of the same form alone (Isomorphic Pruning, Fang et al. 2024).
    The pruning ratio is searched by bisection until the cost is within the budget and as near to it as `attempts`, or channels,
    tell. `taylor` needs `data`: (images, labels) batches whose gradients are summed, or those that `loss` takes, as in `prune`; or
    these `gradients` themselves (`loss_gradients`), where one network is cut several times. `origin`: units that limits refer to,
    where the network was cut before. `prove`: the cut is compared with the whole network in float64
    (`rmprune.pruning.prove`; NotEquivalent where it is wrong). `reconstruct`: then every layer is fitted to the uncut network's on `data`,
    as in `prune`. The result has `rmprune_facts`, as that of `prune`.

    Raises InfeasibleBudget if limits forbid the budget, UnsupportedModel where the
    importance has nothing to go by, or where Torch-Pruning cannot follow the network.
    """
    if importance not in COUPLED_IMPORTANCES:
        raise ConfigError(f"importance {importance!r} is unknown here; there are: {', '.join(COUPLED_IMPORTANCES)}")
    if importance == "taylor" and gradients is None:
        need_data(data, importance)
    refuse_no_images(reconstruct, data)
    data = with_loss(data, loss)
    model, given = as_given(model, example_inputs)  # type: ignore[assignment]
    example_inputs = only_input(given, "coupled pruning")
    structure = _without_unfollowed(model, find_structure(model, example_inputs))
    target = resolve(structure, budget, cost)
    check_coupled(model, structure, importance, example_inputs)
    if importance != "taylor":
        gradients = {}
    elif gradients is None:
        assert data is not None
        gradients = loss_gradients(model, data)
    cut = functools.partial(cut_at, model, example_inputs, structure, importance, isomorphic, gradients)
    best = _nearest(model, structure, budget, target, origin, cut, attempts, exact=not isomorphic)
    if best is None:
        if least_cost(structure, budget, target.cost, origin) > target.limit:
            raise InfeasibleBudget(f"coupled pruning: {explain(structure, budget, target, origin)}")
        raise InfeasibleBudget(
            f"coupled pruning: {budget.name} {budget.value:g} was met by no cut of Torch-Pruning, which leaves or ties "
            "more channels than these limits ask for; use another method"
        )
    pruned, slices = best
    error = prove_slices(model, pruned, slices, example_inputs, "Torch-Pruning's cut") if prove else None
    kept = _kept(model, structure, slices)
    if reconstruct:
        keep = {group.name: _units(group, kept) for group in structure.groups}
        with fitting():
            fitted = refit(model, structure, keep, fitting_images(data or (), model)).train(model.training)
            if {name: t.shape for name, t in fitted.state_dict().items()} != {
                name: t.shape for name, t in pruned.state_dict().items()
            }:
                raise UnsupportedModel("Torch-Pruning cut what is no group of channels here")
        pruned = fitted
    check_outputs(model, pruned, example_inputs)
    note_kept(pruned, model, kept)
    note_cut(pruned, model, structure, error)
    return pruned  # type: ignore[return-value]


CoupledCut = tuple[nn.Module, dict[str, Slices]]


def _nearest(
    model: nn.Module, structure: Structure, budget: Budget, target: Target, origin: Mapping[str, int] | None,
    cut: Callable[[Mapping[str, int], int, float], CoupledCut], attempts: int, *, exact: bool,
) -> CoupledCut | None:  # fmt: skip
    """The cut by Torch-Pruning whose cost comes nearest to the limit from below, looked for by bisection of its ratio; None where none is.

    `cut(least, round_to, ratio)`; `exact`: two ratios that are less than a channel of all apart make the same cut.
    """
    allowed = allowed_widths(structure, budget, origin)
    least = {name: found[0] for name, found in allowed.items()}
    most = structure.units if budget.max_fraction == 1 else {name: found[-1] for name, found in allowed.items()}
    outputs = (getattr(m, "out_channels", getattr(m, "out_features", 0)) for m in model.modules())
    ranked = sum(count for count in outputs if isinstance(count, int))  # or fewer; others' may be lists, None
    best: tuple[float, CoupledCut] | None = None
    low, high = 0.0, 1.0
    for _ in range(attempts):
        if exact and low > 0 and high < 1 and (high - low) * ranked < 1:
            break  # every ratio between takes as many channels as one of the two
        ratio = (low + high) / 2
        candidate, slices = cut(least, budget.round_to, ratio)
        value = measured_cost(candidate, structure, target.cost)
        # `_without_unfollowed` left groups alone that are all the channels of each of their producers
        units = {g.name: in_and_out(candidate.get_submodule(g.producers[0]))[1] // g.multiple for g in structure.groups}
        if any(units[name] < least[name] for name in units):
            high = ratio
        elif value > target.limit or any(units[name] > most[name] for name in units):
            low = ratio
        else:
            high = ratio
            if best is None or value > best[0]:
                best = (value, (candidate, slices))
    return None if best is None else best[1]


def _kept(model: nn.Module, structure: Structure, slices: Mapping[str, Slices]) -> dict[str, Tensor]:
    """{layer that could lose output channels: bool mask, True for those that stay}, by what is left of its tensors."""
    masks = {}
    for member in (m for group in structure.groups for m in group.members if m.side != "in"):
        module = model.get_submodule(member.layer)
        masks[member.layer] = torch.ones(member.size, dtype=torch.bool)
        for name, _ in own_tensors(module):
            for dim, index in slices.get(f"{member.layer}.{name}", ()):
                if dim == output_dim(module, name):
                    masks[member.layer] = mask_of(member.size, index)
    return masks


def _units(group: Group, kept: Mapping[str, Tensor]) -> Tensor:
    """Which units of a group stay, by the output channels that its producers keep: those of which nothing went."""
    sides = [kept[member.layer][member.index].flatten(1).all(1) for member in group.members if member.side == "out"]
    return torch.stack(sides).all(0)


def _without_unfollowed(model: nn.Module, structure: Structure) -> Structure:
    """Without the groups that Torch-Pruning would cut wrongly, and not say so: it follows neither what reorders channels nor
    what takes a layer's outputs apart, nor groups and statistics of norms.
    """
    grouped = {layer.name for layer in structure.layers if layer.kind == "conv" and layer.groups > 1}
    moved = {}
    for group in structure.groups:
        whole = all(m.side != "out" or m.index.numel() == m.size for m in group.members)
        straight = all(bool((m.index.flatten().diff() > 0).all()) for m in group.members)
        if not whole or not (straight or any(m.layer in grouped for m in group.members)):
            moved[group.name] = "its channels are reordered or taken apart, which Torch-Pruning does not follow"
        for member in group.members:
            module = model.get_submodule(member.layer)
            if isinstance(module, nn.GroupNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats):
                moved[group.name] = (
                    f"{member.layer} ({type(module).__name__}) has them, which Torch-Pruning does not cut"
                )
    return structure.without(moved) if moved else structure


def measured_cost(pruned: nn.Module, structure: Structure, cost: Cost) -> float:
    """The cost of a network whose layers carry the names of `structure` but have widths of their own."""
    return sum(
        price(cost, layer, *(in_and_out(pruned.get_submodule(layer.name)) if layer.name else (layer.cin, layer.cout)))
        for layer in structure.layers
    )


def check_coupled(model: nn.Module, structure: Structure, importance: str, example_inputs: Tensor) -> None:
    """UnsupportedModel where no channel can be ranked (Torch-Pruning would cut nothing and not say why), or the network not followed."""
    tied = {member.layer for group in structure.groups for member in group.members if member.side == "tied"}
    norms = any(is_batch_norm(model.get_submodule(name)) for name in tied)
    if importance == "batch_norm" and structure.groups and not norms:
        raise UnsupportedModel(
            "coupled pruning by batch-norm scale: there is no batch norm to rank channels by; use coupled-taylor or coupled-norm"
        )
    import torch_pruning as tp

    twin = copied(model).requires_grad_(True)
    with following(model), evaluating(twin), torch.enable_grad():
        list(
            tp.DependencyGraph()
            .build_dependency(twin, example_inputs.to(device_of(model), copy=True), verbose=False)
            .get_all_groups()
        )


def loss_gradients(model: nn.Module, data: Batches) -> dict[str, Tensor]:
    """{parameter: gradient of the loss in eval mode, summed over batches}; the model's own are left alone.

    `data`: (images, labels) batches, whose loss is the mean cross entropy, or `rmprune.data.batches.WithLoss`.
    """
    twin = copied(model).requires_grad_(True).eval()
    twin.zero_grad()
    with torch.enable_grad(), TrainableConvolutions():
        for parts in loss_parts(data, twin):
            for run, _ in parts:
                run().backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
