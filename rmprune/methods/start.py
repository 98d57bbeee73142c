"""The networks that methods start to prune, made of the trained one: by RM, by collapsing blocks, or both. Trains nothing."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.pruning.collapse import collapse_blocks
from rmprune.removal import Removal, plan_removal, remove_residuals

CALIBRATION_IMAGES = 256  # batch-norm statistics of what RM rewrites are measured on these
COLLAPSE_IMAGES = 1024  # training images that the convolutions of collapsed blocks are fitted on, at most,
COLLAPSE_PIXELS = 2**23  # and of so many pixels, since all their maps are held in memory
Examples = Callable[[int], Tensor]
"""So many training images [n, C, H, W]."""


def plain(dense: nn.Module, examples: Examples) -> tuple[nn.Module, dict[str, Any]]:
    """RM on the trained network, with batch norms measured on training images."""
    removal = remove_residuals(dense, examples(CALIBRATION_IMAGES))
    return removal.model, {"removal": removal.facts}


def collapsed(dense: nn.Module, examples: Examples) -> tuple[nn.Module, dict[str, Any]]:
    """Every block as one convolution, merged with its shortcut by RM: a plain chain."""
    network, facts = collapsed_residual(dense, examples)
    removal = remove_residuals(network, examples(CALIBRATION_IMAGES))
    return removal.model, facts | {"removal": removal.facts}


def collapsed_residual(dense: nn.Module, examples: Examples) -> tuple[nn.Module, dict[str, Any]]:
    """Every block as one convolution, residuals kept."""
    found = collapse_blocks(dense, collapse_images(examples))
    return found.model, {"collapsed": found.collapsed}


def half_collapsed(dense: nn.Module, examples: Examples) -> tuple[nn.Module, dict[str, Any]]:
    """That half of the blocks that one convolution fits best, merged by RM; the others as they are, with their residuals."""
    network, facts = half_collapsed_residual(dense, examples)
    removal = merge_free(network, examples(CALIBRATION_IMAGES))
    return removal.model, facts | {"removal": removal.facts}


def half_collapsed_residual(dense: nn.Module, examples: Examples) -> tuple[nn.Module, dict[str, Any]]:
    """That half of the blocks that one convolution fits best as one; all residuals kept."""
    images = collapse_images(examples)
    explained = collapse_blocks(dense, images).collapsed
    best = sorted(explained, key=lambda name: -explained[name])[: math.ceil(len(explained) / 2)]
    found = collapse_blocks(dense, images, keep=[name for name in explained if name not in best])
    return found.model, {"collapsed": found.collapsed}


STARTING: dict[str, Callable[[nn.Module, Examples], tuple[nn.Module, dict[str, Any]]]] = {
    "dense": lambda dense, examples: (dense, {}),
    "plain": plain,
    "collapsed": collapsed,
    "collapsed-residual": collapsed_residual,
    "half-collapsed": half_collapsed,
    "half-collapsed-residual": half_collapsed_residual,
}
"""By name: a new network and the facts for its artifact. Each raises UnsupportedModel where there is nothing for it to do."""


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
