"""AMC's game: layer by layer a kept fraction, executed after rounding and clipping, and one reward at the end. No learning.

After He et al. 2018, section 3.1. What the public code gets wrong and this does not: costs in the state are all in the unit
of the budget; the clip comes after the rounding; the step returns the action that was executed and the state of the
layer that comes next.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rmprune.amc.space import Space, Widths
from rmprune.errors import ConfigError
from rmprune.pruning.layers import SizedLayer

Features = tuple[float, ...]
RewardKind = Literal["accuracy", "error_log_cost"]
FEATURES = (
    "index", "depthwise", "channels_in", "channels_out", "stride", "kernel", "size",
    "share", "cost_reduced", "cost_left", "room", "last_action",
)  # fmt: skip
"""The state, all between 0 and 1. share: this group's layers in the cost of the whole network; cost_reduced: saved so far;
cost_left: what layers of undecided groups cost now, all as parts of the unpruned network's cost; room: what the budget
leaves above the lower limits of everything undecided, as a part of the budget."""


@dataclass(frozen=True)
class Outcome:
    """What a step did: the executed action (kept fraction), the state of the next layer, and whether the episode is over.

    After the last layer the state repeats the last layer's features; nothing may be learned from it.
    """

    action: float
    state: Features
    done: bool


class Environment:
    """One episode after the other over a `Space`; `score` says how accurate a policy is (0 to 1).

    reward "accuracy": the accuracy (for a hard budget); "error_log_cost": -(1 - accuracy) * log(1 + cost), AMC's R_FLOPs, which
    weighs the error with the cost in the unit of the budget (1 + cost: the log of less than a millisecond would reward errors).
    """

    def __init__(self, space: Space, score: Callable[[Widths], float], *, reward: RewardKind = "accuracy") -> None:
        if reward not in ("accuracy", "error_log_cost"):
            raise ConfigError(f"reward {reward!r} is unknown; use 'accuracy' or 'error_log_cost'")
        self.space, self.score, self.kind = space, score, reward
        self._fixed = [_fixed_features(space, index) for index in range(len(space.groups))]
        self._deciders = space.last_deciders()
        self.decided: list[int] = []

    def reset(self) -> Features:
        """Begin an episode; the state of the first layer."""
        self.decided = []
        return self.state()

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest kept fraction that can be executed now."""
        group = len(self.decided)
        highest = self.space.clip(self.decided, self.space.allowed[group][-1])
        units = self.space.whole[group]
        return self.space.lowest[group] / units, highest / units

    def step(self, action: float) -> Outcome:
        """Prune the current layer to this kept fraction, or to what rounding, limits and budget make of it."""
        group = len(self.decided)
        width = self.space.clip(self.decided, self.space.nearest(group, action))
        self.decided.append(width)
        return Outcome(width / self.space.whole[group], self.state(), len(self.decided) == len(self.space.groups))

    @property
    def widths(self) -> Widths:
        """The policy of a finished episode."""
        assert len(self.decided) == len(self.space.groups), "the episode is not over"
        return tuple(self.decided)

    def completed(self) -> Widths:
        """The policy of a finished episode with what it left of a hard budget used up.

        For the reward "error_log_cost", where cost is the agent's business, it is the policy as it is.
        """
        return self.space.fill(self.widths) if self.kind == "accuracy" else self.widths

    def reward(self, accuracy: float, widths: Widths) -> float:
        """The reward of a policy with this accuracy."""
        if self.kind == "accuracy":
            return accuracy
        return -(1 - accuracy) * math.log1p(max(0.0, self.space.cost(widths)))

    def state(self) -> Features:
        """The features of the group to be decided next, see FEATURES."""
        space, count = self.space, len(self.decided)
        group = min(count, len(space.groups) - 1)
        costs = space.layer_costs((*self.decided, *space.whole[count:]))
        left = sum(cost for cost, last in zip(costs, self._deciders, strict=True) if last >= count)
        reduced = 1 - sum(costs) / space.full_cost
        room = 1 - space.cost((*self.decided, *space.lowest[count:])) / space.budget
        last_action = self.decided[-1] / space.whole[count - 1] if count else 1.0
        return (*self._fixed[group], reduced, left / space.full_cost, room, last_action)


def _fixed_features(space: Space, index: int) -> tuple[float, ...]:
    """The features of a group that no decision changes; sizes relative to the largest in the network, on a log scale."""
    layers = {layer.name: layer for layer in space.structure.layers}
    group = space.groups[index]
    producer = layers[group.producers[0]]
    tied = any(layers[m.layer].kind == "depthwise" for m in group.members if m.side == "tied" and m.layer in layers)
    costs = space.layer_costs(space.whole)
    share = sum(costs[i] for i in space.touching(index)) / space.full_cost

    def relative(what: Callable[[SizedLayer], int]) -> float:
        return math.log1p(what(producer)) / math.log1p(max(what(layer) for layer in layers.values()))

    return (
        index / max(1, len(space.groups) - 1),
        float(tied),
        relative(lambda layer: layer.cin),
        relative(lambda layer: layer.cout),
        relative(lambda layer: layer.stride[0]),
        relative(lambda layer: layer.kernel[0]),
        relative(lambda layer: layer.output_size[0]),
        share,
    )
