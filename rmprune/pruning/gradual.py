"""Pruning while training: small cuts between ordinary steps, by Taylor scores summed up from their gradients.

Decides no learning rate.

The network never loses its function: after each small cut training repairs what was lost, and what is weak now shows
in the next scores. The same hook serves plain chains and networks with residuals, so that free and coupled pruning
get the same importance and schedule.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.errors import ArtifactError, ConfigError, DataError
from rmprune.graph.copied import copied
from rmprune.graph.inputs import Inputs
from rmprune.pruning.allocate import allocate, keep_best, least_cost
from rmprune.pruning.budget import Budget, Target, resolve
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Keep, Structure, layer_masks, mask_of, total_cost
from rmprune.pruning.importance import score_groups
from rmprune.pruning.layers import Cost
from rmprune.pruning.named import few
from rmprune.pruning.prove import prove_cut
from rmprune.pruning.surgery import note_cut, note_kept, shrink
from rmprune.pruning.taylor_sum import TaylorSum
from rmprune.training.state import TrainState

MEASURED_FROM = 1.3  # times the budget: from there on the network is measured before each further cut
WITHOUT_DATA = ("batch_norm", "magnitude", "random")


def between_cuts(steps: float, cuts: int) -> Fraction:
    """The steps from one cut to the next where so many are spread evenly over `steps`; at least one."""
    return max(Fraction(1), Fraction(round(steps), cuts))


class GradualPruner:
    """A hook for `rmprune.training.fit`: cuts `state.model` and slices the momentum of `state.optimizer`.

    Every `every` steps the least important channels go, so that the cost falls geometrically from the present one
    to the budget within `prune_epochs`; then training goes on without it. The last cut meets the budget, hard. Every
    cut leaves multiples of `round_to`, so that none is rounded at the end; limits refer to the network at the start.
    `importance`: taylor, or one that needs no data, taken at each cut. `decay`: the share of the old scores that
    survives a cut (0: each cut sees the steps since the last one). `structure`: what may be pruned, by default all
    of `find_structure`. `meets`: measures a network against what the budget stands for. Near the budget no
    cut is made that it does not ask for; where it says r above 1 after the last one, the budget is divided by r, as
    far as the limits allow, and `every` steps later there is one more. Give the model and one image batch at the
    start. The last network is compared with the first (`proved`).

    Raises InfeasibleBudget at once, before any training, where limits forbid the budget; DataError at a cut that no gradient tells
    anything about; NotEquivalent where a cut was wrong.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Inputs, budget: Budget, *, prune_epochs: float,
        every: int | Fraction = 30, importance: str = "taylor", decay: float = 0.5, cost: Cost | None = None,
        rank: str = "per_cost", lookahead: int = 1, structure: Structure | None = None,
        meets: Callable[[nn.Module], float] | None = None,
    ) -> None:  # fmt: skip
        if every < 1 or prune_epochs <= 0 or not 0 <= decay < 1:
            raise ConfigError(
                f"need every >= 1, prune_epochs > 0 and 0 <= decay < 1; got {every}, {prune_epochs} and {decay}"
            )
        self.whole, self.example = model, example_inputs
        self.first = structure or find_structure(model, example_inputs)
        self.budget, self.prune_epochs, self.every, self.decay = budget, prune_epochs, every, decay
        self.importance, self.rank, self.lookahead = importance, rank, lookahead
        if importance not in ("taylor", *WITHOUT_DATA):
            raise ConfigError(
                f"cuts while training rank by taylor (or {', '.join(WITHOUT_DATA)}); importance {importance!r} needs data"
            )
        self.target = resolve(self.first, budget, cost)
        self.start = total_cost(self.first, self.target.cost)
        self.kept = {g.name: torch.arange(g.units) for g in self.first.groups}
        self.scores = TaylorSum(self.first)
        self.cuts, self.done, self.unmeasured, self.meets = 0, False, False, meets
        self.learning = False  # whether a gradient came since the last cut
        flat = {name: torch.ones(units) for name, units in self.first.units.items()}
        self._allocate(flat, final=True)  # refuse an impossible budget now

    def __call__(self, state: TrainState) -> None:
        """After a training step: add its gradients, and cut where it is time."""
        if self.unmeasured:  # Ctrl-C fell into the measuring
            self._measure(state)
        if self.done:
            return
        if self.importance == "taylor":
            self.learning = self.learning or any(p.grad is not None for p in state.model.parameters())
            self.scores.update(state.model)
        planned = self.planned_cuts(state)
        if state.step < self.every * (self.cuts + 1) and state.step < state.total_steps:
            return
        cuts = max(self.cuts + 1, state.step // self.every)
        final = cuts >= planned or state.step >= state.total_steps
        suffices = self._suffices(state)  # takes seconds: after a Ctrl-C in them, this cut is still to be made
        if self.importance == "taylor" and not self.learning:
            raise DataError(
                "cuts while training: no gradient reached the network since the last cut; call this after backward and before the "
                "gradients are cleared, and train the network that the last cut left (`pruner.model`), which is another module"
            )
        self.cuts = cuts
        if suffices:
            self.done = True
            self.proved(state.model)
            return
        scores = self.scores.scores
        if self.importance != "taylor":
            scores = score_groups(self.importance, state.model, self.structure)
        elif not any(bool(score.any()) for score in scores.values()):
            raise DataError(
                "cuts while training: no gradient was seen of all layers that can be cut; call this after backward and before the "
                "gradients are cleared, and where layers are frozen rank by importance='magnitude'"
            )
        elif self.scores.unseen:
            raise DataError(
                f"cuts while training: no gradient has reached what reads {few(sorted(self.scores.unseen))}; where forward stops gradients "
                "(detach, no_grad) or the loss leaves them out rank by importance='magnitude', and where other steps go through them make "
                "fewer cuts"
            )
        keep = self._allocate(scores, final=final, progress=min(1.0, self.cuts / planned))
        if not all(bool(mask.all()) for mask in keep.values()):
            self._cut(state, keep)
        self.scores.scale(self.decay)
        self.learning = False
        self.done = final
        if final:
            self.proved(state.model)
        self.unmeasured = final and self.meets is not None and state.step < state.total_steps
        if self.unmeasured:
            self._measure(state)

    def proved(self, network: nn.Module) -> float:
        """The error of `network`, as these cuts left it, against the first one in float64 (`rmprune.pruning.prove`); notes it there, as
        `prune` does. Raises NotEquivalent where a cut was wrong.
        """
        keep = self._masks(self.kept)
        error = prove_cut(self.whole, self.first, keep, self.example, network=network)
        masks = layer_masks(self.first, keep)
        note_kept(network, self.whole, {layer: mask for (layer, side), mask in masks.items() if side == "out"})
        note_cut(network, self.whole, self.first, error)
        return error

    def _masks(self, kept: Mapping[str, Tensor]) -> Keep:
        return {name: mask_of(self.first.units[name], index) for name, index in kept.items()}

    def planned_cuts(self, state: TrainState) -> int:
        """How many cuts there will be; the last one lies at `prune_epochs`, or at the last step if training is shorter."""
        steps = min(round(self.prune_epochs * state.steps_per_epoch), state.total_steps)
        return max(1, steps // self.every)

    @property
    def structure(self) -> Structure:
        """The network as it is now."""
        return self.scores.structure

    def _allocate(self, scores: Mapping[str, Tensor], *, final: bool, progress: float = 1.0) -> Keep:
        limit = self.target.limit
        if not final and self.start > limit:
            limit = self.start * (limit / self.start) ** progress
        return allocate(
            self.structure, scores, self.budget, target=Target(self.target.cost, limit, self.target.whole),
            origin=self.first.units, rank=self.rank, lookahead=self.lookahead,
        )  # fmt: skip

    def _suffices(self, state: TrainState) -> bool:
        """Whether the network, near the end of its cuts, already meets what the budget stands for."""
        near = total_cost(self.structure, self.target.cost) <= MEASURED_FROM * self.target.limit
        return self.meets is not None and near and self.meets(copied(state.model)) <= 1

    def _measure(self, state: TrainState) -> None:
        """After the last cut: plan another where the network takes too much and the limits leave something to cut."""
        assert self.meets is not None
        excess = self.meets(copied(state.model))
        least = least_cost(self.structure, self.budget, self.target.cost, self.first.units) * (1 + 1e-9)
        if excess > 1 and least < total_cost(self.structure, self.target.cost):
            limit = max(least, self.target.limit / (1.01 * excess))
            self.target, self.done = replace(self.target, limit=limit), False
        self.unmeasured = False

    def _cut(self, state: TrainState, keep: Keep) -> None:
        model, optimizer = shrink(state.model, keep, self.structure, state.optimizer)
        assert optimizer is not None
        state.model, state.optimizer = model, optimizer
        self.scores.shrink(keep)
        self.kept = {name: index[keep[name]] for name, index in self.kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which `load_state_dict` goes on exactly."""
        scores = {name: score.clone() for name, score in self.scores.scores.items()}
        state = {"cuts": self.cuts, "done": self.done, "unmeasured": self.unmeasured, "limit": self.target.limit}
        return state | {"kept": dict(self.kept), "scores": scores}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the hook must have been made from the same network and budget as the saved one. Raises ArtifactError for
        another network's."""
        kept, scores = saved["kept"], saved["scores"]
        units = self.first.units
        if set(kept) != set(units) or any(len(i) == 0 or int(i.max()) >= units[n] for n, i in kept.items()):
            raise ArtifactError("the checkpoint's cuts are of another network; delete it to start again")
        self.kept = {name: index.clone() for name, index in kept.items()}
        self.scores.reset(self.first.shrunk(self._masks(kept)), scores)
        self.cuts, self.done, self.unmeasured = int(saved["cuts"]), bool(saved["done"]), bool(saved.get("unmeasured"))
        self.target = replace(self.target, limit=float(saved["limit"]))


class PolicyPruner(GradualPruner):
    """A hook for `fit` that cuts to given widths while training, by the Taylor scores of the training steps themselves.

    widths: group -> units to keep in the end. Each group shrinks geometrically, all together, over `prune_epochs`; which
    of its channels go is decided anew at every cut.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Tensor, widths: Mapping[str, int], *, prune_epochs: float,
        every: int | Fraction = 30,
    ) -> None:  # fmt: skip
        self.widths = dict(widths)
        unused = Budget(ratio=0.5)  # the policy takes its place
        super().__init__(model, example_inputs, unused, prune_epochs=prune_epochs, every=every)

    def _allocate(self, scores: Mapping[str, Tensor], *, final: bool, progress: float = 1.0) -> Keep:
        now, first = self.structure.units, self.first.units
        keep: Keep = {}
        for name, units in now.items():
            goal = self.widths.get(name, first[name])
            wanted = goal if final else round(first[name] * (goal / first[name]) ** progress)
            keep[name] = keep_best(scores[name], min(units, max(goal, wanted)))
        return keep
