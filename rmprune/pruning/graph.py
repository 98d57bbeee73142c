"""The prunable groups of any network: by our own walk over a chain, by Torch-Pruning where the network branches."""

from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.pruning.chain import chain_structure
from rmprune.pruning.dependency import dependency_structure
from rmprune.pruning.structure import Structure


def find_structure(model: nn.Module, example_inputs: Tensor) -> Structure:
    """The groups of channels that can go, the layers they size, and what cannot be pruned and why. Raises
    UnsupportedModel if nothing can.
    """
    structure = chain_structure(model, example_inputs) or dependency_structure(model, example_inputs)
    if not structure.groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in structure.frozen.items())
        raise UnsupportedModel(
            f"{type(model).__name__}: no channel can be pruned ({reasons or 'no convolution or linear layer'})"
        )
    return structure
