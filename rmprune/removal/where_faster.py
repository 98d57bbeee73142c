"""Which residuals to remove from a network whose function is settled: those whose removal makes it faster, measured."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rmprune.removal.remove import Removal, plan_removal, remove_residuals
from rmprune.removal.reports import BlockReport

GAIN = 0.99  # a residual goes if the network then takes at most this part of its time: less is noise
_NO_FASTER = "without it the network is no faster"
_TOO_DEAR = "the rows that its removal reserves do not fit the budget"


def remove_where_faster(
    model: nn.Module,
    example_inputs: Tensor,
    ratios: Callable[[Mapping[str, nn.Module]], Mapping[str, float]],
    fits: Callable[[nn.Module], bool] = lambda network: True,
    *,
    keep: Iterable[str] = (),
    **settings: Any,
) -> Removal:
    """`model` without those residuals whose removal, one at a time, makes it faster; `model` itself where none does.

    Removal is exact, so time is all that decides: a residual stays where its addition is cheaper than the reserved rows. One that
    cannot go while those before it stay is tried with them, and pays where it makes the network faster than without them alone.
    `ratios` measures networks by name, in turns, in one unit; `fits` says whether a network is within another budget, and what
    does not fit is not measured. Those that pay one by one are removed together and measured again. `keep` and `settings`: as
    `remove_residuals` takes them, whose errors are raised, but no error where nothing can be removed.
    """
    blocks = plan_removal(model, example_inputs, keep=keep, **settings)
    names = _removable(blocks)
    reasons = {block.name: _NO_FASTER if block.removable else block.reason for block in blocks}

    def others(gone: Collection[str]) -> list[str]:
        return [*keep, *(name for name in names if name not in gone)]

    def without(gone: Collection[str]) -> tuple[Removal, float]:
        """The network without these residuals, and the part of its time that it then takes."""
        removal = remove_residuals(model, example_inputs, keep=others(gone), **settings)
        if not fits(removal.model):
            return removal, math.inf
        times = ratios({"kept": model, "removed": removal.model})
        return removal, times["removed"] / times["kept"]

    def needed(last: int) -> list[str]:
        """The shortest run of residuals that ends in this one and in which it can go."""
        own = settings | {"fuse": "never"}
        runs = (names[first : last + 1] for first in range(last, -1, -1))
        return next(
            run
            for run in runs
            if names[last] in _removable(plan_removal(model, example_inputs, keep=others(run), **own))
        )

    paying: dict[str, float] = {}
    for last in range(len(names)):
        removal, part = without(needed(last))
        if part == math.inf:
            reasons[names[last]] = _TOO_DEAR
        if part <= GAIN * min((paying[name] for name in removal.removed if name in paying), default=1.0):
            paying |= dict.fromkeys(removal.removed, part)
    if paying:
        together, part = without(paying)
        if part <= GAIN:
            return replace(together, kept={name: reasons.get(name, why) for name, why in together.kept.items()})
        if part == math.inf:
            reasons |= dict.fromkeys(paying, _TOO_DEAR)
    return Removal(model, [], reasons, 0.0, blocks)


def _removable(blocks: list[BlockReport]) -> list[str]:
    return [block.name for block in blocks if block.removable]
