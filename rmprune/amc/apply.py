"""From a policy to a network: found in a search, verified as a whole, and reached in one cut or in small cuts while training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rmprune.amc.space import Space, Widths
from rmprune.errors import InfeasibleBudget
from rmprune.pruning.budget import Budget, keep_best
from rmprune.pruning.gradual import GradualPruner
from rmprune.pruning.structure import Keep


class PolicyPruner(GradualPruner):
    """A hook for `fit` that cuts to given widths while training, by the Taylor scores of the training steps themselves.

    widths: group -> units to keep in the end. Each group shrinks geometrically, all together, over `prune_epochs`; which
    of its channels go is decided anew at every cut.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor,
        widths: Mapping[str, int],
        *,
        prune_epochs: float,
        every: int = 30,
        decay: float = 0.5,
    ) -> None:
        self.widths = dict(widths)
        unused = Budget(ratio=0.5)  # the policy takes its place
        super().__init__(model, example_inputs, unused, prune_epochs=prune_epochs, every=every, decay=decay)

    def _allocate(self, scores: Mapping[str, Tensor], *, final: bool, progress: float = 1.0) -> Keep:
        now, first = self.structure.units, self.first.units
        keep: Keep = {}
        for name, units in now.items():
            goal = self.widths.get(name, first[name])
            wanted = goal if final else round(first[name] * (goal / first[name]) ** progress)
            keep[name] = keep_best(scores[name], min(units, max(goal, wanted)))
        return keep


@dataclass(frozen=True)
class Verified:
    """A policy and the cost of its whole network, as a fraction of the original's; `attempts` networks were measured."""

    widths: Widths
    ratio: float
    attempts: int


def meet_budget(
    space: Space,
    widths: Widths,
    measure: Callable[[Widths], float],
    target: float,
    *,
    slack: float = 0.05,
    attempts: int = 8,
) -> Verified:
    """The policy of this shape whose network, measured as a whole, costs between (1 - slack) * target and target.

    measure: cost of a policy's network as a fraction of the original's (a measured time, say); target: the largest fraction
    allowed. `widths` is kept if it fits; otherwise the budget inside the space is corrected by what was measured and the
    policy scaled to it, always from below. Of several that meet the target the costliest is taken. Raises
    InfeasibleBudget where `attempts` networks or the limits did not suffice.
    """
    fractions, predicted = space.fractions(widths), space.cost(widths)
    best: Verified | None = None
    tried: dict[Widths, float] = {}
    while len(tried) < attempts:
        ratio = tried[widths] = measure(widths)
        if ratio <= target and (best is None or ratio > best.ratio):
            best = Verified(widths, ratio, len(tried))
        if best is not None and (best.ratio >= (1 - slack) * target or widths == space.whole):
            break
        predicted *= (1 - slack / 2) * target / ratio
        widths = _scaled(space, fractions, predicted)
        while best is None and widths in tried and widths != space.lowest:
            predicted *= 1 - slack / 2
            widths = _scaled(space, fractions, predicted)
        if widths in tried:
            break
        predicted = space.cost(widths)
    if best is None:
        least = min(tried.values())
        raise InfeasibleBudget(
            f"no policy of {len(tried)} measured as whole networks met the budget of {target:.3g} times the original; the "
            f"nearest took {least:.3g}: raise the budget or lower the limits (lowest={space.limits.lowest})"
        )
    return Verified(best.widths, best.ratio, len(tried))


def _scaled(space: Space, fractions: Sequence[float], budget: float) -> Widths:
    return space.with_budget(max(budget, space.least_cost)).fit(fractions)


def policy_by_group(space: Space, widths: Widths) -> dict[str, int]:
    """Group name -> units kept."""
    return {group.name: width for group, width in zip(space.groups, widths, strict=True)}
