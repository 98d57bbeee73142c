"""The networks that methods start to prune, made of the trained one: blocks collapsed, residuals removed. Trains nothing."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.methods.table import CollapsedBlocks, Residuals
from rmprune.pruning.collapse import collapse_blocks
from rmprune.removal import Removal, plan_removal, remove_residuals

CALIBRATION_IMAGES = 256  # batch-norm statistics of what RM rewrites are measured on these
COLLAPSE_IMAGES = 1024  # training images that the convolutions of collapsed blocks are fitted on, at most,
COLLAPSE_PIXELS = 2**23  # and of so many pixels, since all their maps are held in memory
Examples = Callable[[int], Tensor]
"""So many training images [n, C, H, W]."""


def start(
    dense: nn.Module, collapse: CollapsedBlocks, residuals: Residuals, examples: Examples
) -> tuple[nn.Module, dict[str, Any]]:
    """The network that these choices make of the trained one, on its device, and the facts for its artifact.

    With "none" and "kept" it is `dense` itself. Raises UnsupportedModel where there is nothing to collapse or to remove.
    """
    network, facts = dense, {}
    if collapse != "none":
        images = collapse_images(examples)
        found = collapse_blocks(dense, images)
        if collapse == "half":
            order = sorted(found.collapsed, key=lambda name: -found.collapsed[name])
            found = collapse_blocks(dense, images, keep=set(order[math.ceil(len(order) / 2) :]))
        network, facts["collapsed"] = found.model, found.collapsed
    if residuals in ("removed", "merged"):
        remove = merge_free if residuals == "merged" else remove_residuals
        removal = remove(network, examples(CALIBRATION_IMAGES))
        network, facts["removal"] = removal.model, removal.facts
    return network, facts


def merge_free(model: nn.Module, images: Tensor) -> Removal:
    """RM for those residuals alone that need no reserved channel: branch and shortcut are linear, their kernels add up."""
    reports = plan_removal(model, images)
    if not any(report.removable and report.reserved == 0 for report in reports):
        raise UnsupportedModel("no residual can be removed without reserving channels")
    return remove_residuals(model, images, keep=[r.name for r in reports if r.removable and r.reserved])


def collapse_images(examples: Examples) -> Tensor:
    """The training images that convolutions are fitted on: fewer where they are large."""
    pixels = math.prod(examples(1).shape[2:])
    return examples(max(64, min(COLLAPSE_IMAGES, COLLAPSE_PIXELS // pixels)))
