"""The prunable groups of any network: by our own walk over a chain, by Torch-Pruning where the network branches."""

import torch
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.pruning.chain import chain_structure
from rmprune.pruning.dependency import dependency_structure
from rmprune.pruning.structure import Structure, outputs
from rmprune.pruning.surgery import shrink


def find_structure(model: nn.Module, example_inputs: Tensor) -> Structure:
    """The groups of channels that can go, the layers they size, and what cannot be pruned and why. Raises
    UnsupportedModel if nothing can.
    """
    structure = chain_structure(model, example_inputs) or dependency_structure(model, example_inputs)
    structure = _without_returned(structure, model, example_inputs)
    if not structure.groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in structure.frozen.items())
        raise UnsupportedModel(
            f"{type(model).__name__}: no channel can be pruned ({reasons or 'no convolution or linear layer'})"
        )
    return structure


def _without_returned(structure: Structure, model: nn.Module, example_inputs: Tensor) -> Structure:
    """Leave groups whole whose channels are in an output although later layers read them too (a backbone's feature maps)."""
    shapes = [x.shape for x in outputs(model, example_inputs)]
    if len(shapes) == 1:
        return structure
    returned = {}
    for group in structure.groups:
        if group.units > 1:
            stay = torch.arange(group.units) > 0
            smaller = shrink(model, {group.name: stay}, structure)[0]
            if [x.shape for x in outputs(smaller, example_inputs)] != shapes:
                returned[group.name] = "its channels are among the network's outputs"
    return structure.without(returned) if returned else structure
