"""Fusing on its own: batch norms and neighbouring convolutions of any network, for use again after pruning. Removes nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmprune.errors import ConfigError
from rmprune.removal.build import materialise, target_of
from rmprune.removal.check import check_inputs, relative_error
from rmprune.removal.diagnose import over_tolerance
from rmprune.removal.fuse import RULES, fuse_convolutions, join_norms
from rmprune.removal.network import example_tuple
from rmprune.removal.reference import reference_copy
from rmprune.removal.trace import normalise

Inputs = Tensor | tuple[Tensor, ...]


def fuse_linear(
    model: nn.Module, example_inputs: Inputs, rule: str = "cheaper", *, tolerance: float = 1e-10
) -> nn.Module:
    """A new network in which neighbouring convolutions are one where that is exact and, by rule "cheaper", no more MACs.

    A product that replaces a batch norm gets a new one, the identity on the statistics of example_inputs, (N, C, H, W).
    Raises NotEquivalent over `tolerance`, ConfigError for an unknown rule, UnsupportedModel where torch.fx cannot trace.
    """
    if rule not in RULES:
        raise ConfigError(f"rule={rule!r} is none of {', '.join(RULES)}")
    return _rebuilt(model, example_inputs, rule, True, tolerance)


def fold_batch_norms(model: nn.Module, example_inputs: Inputs, *, tolerance: float = 1e-10) -> nn.Module:
    """A new network in eval mode whose batch norms after convolutions are folded into them. Raises as `fuse_linear`."""
    return _rebuilt(model, example_inputs, "never", False, tolerance)


@torch.no_grad()
def _rebuilt(model: nn.Module, example_inputs: Inputs, rule: str, batch_norm: bool, tolerance: float) -> nn.Module:
    inputs = example_tuple(example_inputs)
    reference = reference_copy(model)
    network = normalise(reference, inputs)
    if not batch_norm:
        join_norms(network)
    fuse_convolutions(network, rule)
    checked, groups = check_inputs(inputs, len(inputs[0]), 3)
    expected = reference(*(x.clone() for x in checked))  # it may write into its inputs
    result, found = materialise(network, checked, len(inputs[0]), target_of(model), batch_norm)
    error = relative_error(expected, found, groups)
    if not error <= tolerance:
        raise over_tolerance(model, checked, groups, expected, error, tolerance)
    return result
