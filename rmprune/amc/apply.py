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
    """A policy and the cost of its whole network, as a fraction of the original's; so many `networks` were measured."""

    widths: Widths
    ratio: float
    networks: int


Measure = Callable[[Sequence[Widths]], Sequence[float]]
"""Costs of several policies' whole networks, as fractions of the original's, measured in turns with each other."""
_FIRST_STEPS = (1.0, 1.08, 0.92, 0.85)  # times the predicted cost of the policy
_POINTS = 4  # policies measured at once from then on


def meet_budget(
    space: Space,
    widths: Widths,
    measure: Measure,
    target: float,
    *,
    slack: float = 0.05,
    margin: float = 0.01,
    rounds: int = 5,
) -> Verified:
    """The policy of this shape whose network, measured as a whole, costs between (1 - slack) * target and target.

    The policy is scaled up and down and several sizes are measured at once, ever closer to the largest that costs at most
    (1 - margin) * target; that one is measured once more and must be below the target again. `target` is a fraction of the
    original's cost. Where widths are too coarse for the slack, the costliest policy below the target is taken. Raises
    InfeasibleBudget where none was below.
    """
    fractions, size = space.fractions(widths), space.cost(widths)
    tried: dict[Widths, float] = {}
    plan = [widths, *(_scaled(space, fractions, step * size) for step in _FIRST_STEPS[1:])]
    for _ in range(rounds):
        new = [policy for policy in dict.fromkeys(plan) if policy not in tried]
        if not new:
            break
        tried |= dict(zip(new, measure(new), strict=True))
        best = _largest_below(tried, (1 - margin) * target)
        while best is not None and tried[best] >= (1 - slack) * target:
            again = measure([best])[0]
            if again <= target:
                return Verified(best, again, len(tried))
            tried[best] = again
            best = _largest_below(tried, (1 - margin) * target)
        low = space.least_cost if best is None else space.cost(best)
        high = min(
            (space.cost(w) for w, r in tried.items() if r > target and space.cost(w) > low), default=space.full_cost
        )
        plan = [
            _scaled(space, fractions, low * (high / low) ** (i / _POINTS)) for i in range(_POINTS + (best is not None))
        ]
    best = _largest_below(tried, target)
    if best is None:
        raise InfeasibleBudget(
            f"no policy of {len(tried)} measured as whole networks met the budget of {target:.3g} times the original; the "
            f"nearest took {min(tried.values()):.3g}: raise the budget or lower the limits (lowest={space.limits.lowest})"
        )
    return Verified(best, tried[best], len(tried))


def _largest_below(tried: Mapping[Widths, float], limit: float) -> Widths | None:
    """The costliest of the measured policies that cost at most `limit`."""
    return max((w for w, ratio in tried.items() if ratio <= limit), key=lambda w: tried[w], default=None)


def _scaled(space: Space, fractions: Sequence[float], budget: float) -> Widths:
    return space.with_budget(max(budget, space.least_cost)).fit(fractions)


def policy_by_group(space: Space, widths: Widths) -> dict[str, int]:
    """Group name -> units kept."""
    return {group.name: width for group, width in zip(space.groups, widths, strict=True)}
