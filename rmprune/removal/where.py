"""Which residuals to remove from a network whose function is settled: those whose removal makes it faster, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from rmprune.removal.remove import Removal, plan_removal, remove_residuals

GAIN = 0.99  # a residual goes if the network then takes at most this part of its time: less is noise


def remove_where_faster(
    model: nn.Module,
    example_inputs: Tensor,
    ratios: Callable[[Mapping[str, nn.Module]], Mapping[str, float]],
    fits: Callable[[nn.Module], bool] = lambda network: True,
) -> Removal:
    """`model` without those residuals whose removal, one at a time, makes it faster; `model` itself where none does.

    Removal is exact, so time is all that decides: a residual stays where its addition is cheaper than the reserved rows.
    `ratios` measures networks by name, in turns, in one unit; `fits` says whether a network is within another budget, and what
    does not fit is not measured. Those that pay one by one are removed together and measured again. Raises what
    `remove_residuals` raises, but no error where nothing can be removed.
    """
    blocks = plan_removal(model, example_inputs)
    names = [block.name for block in blocks if block.removable]

    def without(gone: list[str]) -> tuple[Removal, bool]:
        removal = remove_residuals(model, example_inputs, keep=[name for name in names if name not in gone])
        if not fits(removal.model):
            return removal, False
        times = ratios({"kept": model, "removed": removal.model})
        return removal, times["removed"] <= GAIN * times["kept"]

    paying = [name for name in names if without([name])[1]]
    if paying:
        together, pays = without(paying)
        if pays:
            return together
    reasons = {
        block.name: "without it the network is no faster" if block.removable else block.reason for block in blocks
    }
    return Removal(model, [], reasons, 0.0, blocks)
