"""A plan carried out: the blocks of a network become what was chosen for them, then its channel groups as wide as planned."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.config import REMOVAL, RemovalConfig
from rmprune.data.batches import Batches, affordable, network_inputs
from rmprune.errors import UnsupportedModel
from rmprune.graph.inputs import as_tuple
from rmprune.graph.network import flat_name
from rmprune.pruning.allocate import keep_best
from rmprune.pruning.collapse import shorten_blocks
from rmprune.pruning.groups import Structure
from rmprune.pruning.importance import score_groups
from rmprune.pruning.layers import in_and_out
from rmprune.pruning.options import block_names, block_options
from rmprune.pruning.plan import Choice, SlimPlan, layers_digest
from rmprune.pruning.prove import prove_cut
from rmprune.pruning.prunable import find_prunable
from rmprune.pruning.refit import fitting, fitting_images, refit
from rmprune.pruning.surgery import note_cut, shrink
from rmprune.removal import remove_residuals

CALIBRATION_IMAGES = (
    64  # batch-norm statistics of what RM rewrites are measured on these, until training measures them anew
)
COLLAPSE_IMAGES = 1024  # training images that the convolutions of collapsed blocks are fitted on, at most
Examples = Callable[[int], Tensor]
"""So many training images [n, C, H, W]."""


def carry_out_blocks(
    model: nn.Module, choices: Mapping[str, Choice], examples: Examples, removal: RemovalConfig = REMOVAL,
    names: Iterable[str] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """The network in which each block is what was chosen (one that is not named is kept), and the facts for its artifact.

    First branches are fitted and dropped, in order, then residuals removed, exactly; `model` itself where nothing changes.
    `removal`: how; which residuals go is what was chosen. `names`: of all blocks, as `block_options` has them, where that is at hand.
    Raises UnsupportedModel where a block has no such option (see `rmprune.pruning.options.block_options`).

    >>> from rmprune.pruning.carry_out import carry_out_blocks
    >>> model, images = rmprune.models.create("resnet8", num_classes=10, width=4).eval(), torch.randn(64, 3, 8, 8)
    >>> network, facts = carry_out_blocks(model, {"layer1.0": "merge", "layer3.0": "drop"}, lambda count: images[:count])
    >>> sorted(facts["collapsed"]), facts["removal"]["removed"], list(facts["removal"]["kept"])
    (['layer1.0', 'layer3.0'], ['layer1.0'], ['layer2.0'])
    """

    def named(*wanted: Choice) -> list[str]:
        return [name for name, choice in choices.items() if choice in wanted]

    network = model
    facts: dict[str, Any] = {"blocks": dict(choices), "fuse": removal.fuse}
    if named("merge", "collapse", "drop"):
        images = collapse_images(examples)
        shorter = shorten_blocks(model, images, collapse=named("merge", "collapse"), drop=named("drop"))
        network, facts["collapsed"] = shorter.model, shorter.collapsed
    if gone := named("remove", "fuse", "merge"):
        images = examples(CALIBRATION_IMAGES)
        names = list(names or block_names(model, images))
        if strange := [name for name in choices if name not in names]:
            raise UnsupportedModel(f"there is no block {strange[0]}; there are: {', '.join(names) or 'none'}")
        here = names if network is model else block_names(network, images)  # a flat network may call them otherwise
        now = dict(zip(here, (name for name in names if name not in named("drop")), strict=True))
        keep = [name for name, block in now.items() if block not in gone]
        fused = [name for name, block in now.items() if choices.get(block) == "fuse"]
        found = remove_residuals(network, images, **vars(removal) | {"keep": keep, "fused": fused, "dropout": True})
        network, facts["removal"] = (
            found.model,
            found.facts
            | {
                "removed": [now[name] for name in found.removed],
                "kept": {now[name]: reason for name, reason in found.kept.items()},
            },
        )
        for name in gone:
            if name in facts["removal"]["kept"]:
                raise UnsupportedModel(
                    f"{name} as {choices[name]!r}, with the others as chosen: {facts['removal']['kept'][name]}"
                )
    return network, facts


def carry_out_plan_blocks(
    model: nn.Module, plan: SlimPlan, examples: Examples, removal: RemovalConfig = REMOVAL
) -> tuple[nn.Module, dict[str, Any]]:
    """`carry_out_blocks` of what a plan says of every block, whatever it says of widths; raises ConfigError for another network's plan."""
    removal = replace(removal, fuse=plan.fuse)
    options = block_options(model, examples(2), alone=False, removal=removal)
    return carry_out_blocks(model, plan.check(model, options), examples, removal, options)


def collapse_images(examples: Examples) -> Tensor:
    """The training images that convolutions are fitted on: fewer where they are large."""
    return examples(affordable(COLLAPSE_IMAGES, examples(1).shape[2:]))


def carry_out(
    model: nn.Module, plan: SlimPlan, data: Batches, *, importance: str = "taylor", reconstruct: bool = True,
    removal: RemovalConfig = REMOVAL,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """The network of a plan, made of `model` in eval mode on its device, and the facts for its artifact, the plan with every choice and
    width spelled out among them; nothing is trained.

    data: (images [N, C, H, W], labels [N]) batches of training images, which blocks and layers are fitted on and, by `importance`,
    the units that stay are chosen by. Of the groups that the blocks then have, those that the plan names get their width.
    `removal`: how residuals go; what is fused is the plan's.
    Raises ConfigError for a plan that does not fit this network, UnsupportedModel where the choices cannot be had together.

    >>> from rmprune.pruning.carry_out import carry_out
    >>> from rmprune.pruning.plan import SlimPlan
    >>> model, data = rmprune.models.create("resnet8", num_classes=10, width=4).eval(), [(torch.randn(64, 3, 8, 8), torch.arange(64) % 10)]
    >>> network, _ = carry_out(model, SlimPlan({"layer1.0": "merge", "layer2.0": "drop"}, {"conv1": 3}), data)
    >>> network.conv1.out_channels
    3
    """
    images = torch.cat(list(network_inputs(data, model)))
    network, facts = carry_out_plan_blocks(model, plan, lambda count: images[:count], removal)
    network, _, structure = find_prunable(network, as_tuple(network, images[:2]))
    units = plan.units(structure)
    result, error = cut_to(network, structure, units, data, importance, reconstruct)
    widths = {flat_name(name): count for name, count in units.items()}
    whole = SlimPlan(facts["blocks"], widths, plan.fuse, layers_digest(model))
    return result, facts | {"plan": whole.to_dict(), "cut_error": error}


def cut_to(
    network: nn.Module, structure: Structure, units: Mapping[str, int], data: Batches, importance: str,
    reconstruct: bool,
) -> tuple[nn.Module, float]:  # fmt: skip
    """The network with so many units of each group, its most important ones, and its layers fitted to what they put out before; the
    error of its cut (`prove_cut`)."""
    scores = score_groups(importance, network, structure, data)
    keep = {name: keep_best(score, units[name]) for name, score in scores.items()}
    if all(bool(mask.all()) for mask in keep.values()):
        return network, 0.0
    images = fitting_images(data, network)
    error = prove_cut(network, structure, keep, images[:2])
    with fitting():
        smaller = refit(network, structure, keep, images) if reconstruct else shrink(network, keep, structure)[0]
    note_cut(smaller, network, structure, error)
    return smaller, error


def widths_of(structure: Structure, network: nn.Module) -> dict[str, int]:
    """How many units each group of `structure` still has in `network`, which was cut from the one that it describes, by flat names.

    A layer may have channels of several groups, and some that stay: what all layers lost is solved for what each group lost.
    """
    place = {group.name: i for i, group in enumerate(structure.groups)}
    rows, lost = [], []
    for layer in structure.layers:
        if layer.kind == "rest":
            continue
        cin, cout = in_and_out(network.get_submodule(layer.name))
        for ports, gone in ((layer.inputs, layer.cin - cin), (layer.outputs, layer.cout - cout)):
            row = torch.zeros(len(place), dtype=torch.float64)
            for group, channels in ports:
                row[place[group]] += channels
            rows.append(row)
            lost.append(float(gone))
    found = torch.linalg.lstsq(torch.stack(rows), torch.tensor(lost, dtype=torch.float64)[:, None], driver="gelsd")
    return {flat_name(g.name): g.units - round(float(found.solution[i])) for i, g in enumerate(structure.groups)}
