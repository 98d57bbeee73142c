"""The networks that methods start to prune: the trained one, its blocks as the method's rule chooses them. Trains nothing."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from rmprune.config import REMOVAL, RemovalConfig
from rmprune.errors import UnsupportedModel
from rmprune.methods.table import STARTS
from rmprune.pruning.carry_out import Examples, carry_out_blocks, collapse_images
from rmprune.pruning.collapse import shorten_blocks
from rmprune.pruning.options import block_options
from rmprune.pruning.plan import Choice, Options
from rmprune.removal.remove import nothing_to_remove


def start(
    dense: nn.Module, name: str, examples: Examples, removal: RemovalConfig = REMOVAL
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of this name (of STARTS), made of the trained one, on its device, and the facts for its artifact.

    "dense" is `dense` itself. Raises UnsupportedModel where no block has what the rule prefers.
    """
    rule = STARTS[name]
    if rule.prefer == ("keep",):
        return dense, {}
    removal = replace(removal, fuse=rule.fuse or removal.fuse)
    options = block_options(dense, examples(2), linear=False, alone=False, removal=removal, wanted=rule.prefer)
    choices: dict[str, Choice] = {
        block: next(choice for choice in rule.prefer if not own[choice]) for block, own in options.items()
    }
    wanted = [block for block, choice in choices.items() if choice == rule.prefer[0]]
    if not wanted:
        raise _nothing(rule.prefer[0], options)
    if rule.half:
        explained = shorten_blocks(dense, collapse_images(examples), collapse=wanted).collapsed
        order = sorted(explained, key=lambda block: -explained[block])
        choices |= dict.fromkeys(order[math.ceil(len(order) / 2) :], "keep")
    network, facts = carry_out_blocks(dense, choices, examples, removal, options)
    for block in facts.get("removal", {}).get("kept", {}):
        facts["removal"]["kept"][block] = options[block]["remove"] or facts["removal"]["kept"][block]
    return network, facts


def _nothing(choice: Choice, options: Options) -> UnsupportedModel:
    reasons: Mapping[str, str] = {block: own[choice] for block, own in options.items()}
    if choice == "remove":
        return nothing_to_remove(reasons)
    why = "; ".join(f"{block}: {reason}" for block, reason in reasons.items())
    return UnsupportedModel(
        f"no block to {'fuse' if choice == 'fuse' else 'collapse'}: {why or 'the network has no residual'}"
    )
