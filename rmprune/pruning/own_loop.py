"""Pruning while somebody else trains: `GradualPruner` for loops that are not ours. Makes no step and decides no learning rate."""

import numbers

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rmprune.config import TrainConfig
from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.graph.facts import facts_of
from rmprune.graph.inputs import Inputs, as_given
from rmprune.graph.tf32 import tf32
from rmprune.pruning.budget import Budget, refuse_no_budget
from rmprune.pruning.gradual import GradualPruner, between_cuts
from rmprune.pruning.groups import Structure
from rmprune.pruning.named import few
from rmprune.pruning.prove import prove_groups
from rmprune.pruning.prunable import find_prunable
from rmprune.pruning.taylor_sum import is_frozen
from rmprune.training.state import TrainState


class Pruner:
    """Small cuts while you train: call `step()` after each step of your optimizer, before the gradients are cleared.

    Within `steps` steps `cuts` cuts are made (one a step at most), spread evenly; the last one, at the last step, meets the budget, hard,
    and `done` is True from then on. Each
    cut puts a smaller network into `model`, which the loop must call from then on (`step()` says so by returning True), and brings
    `optimizer` along in place: its parameters are those of the new network, its state (momentum, Adam's moments) is cut like they
    are, and whatever holds it, such as a schedule of learning rates, goes on. State of another form than its parameter begins anew, with
    a warning. Channels go by the Taylor scores that the gradients of the
    steps add up to, or by `importance` "batch_norm", "magnitude" or "random". The model may have residuals, whose streams are then cut
    coupled, or none (`remove_residuals` first, with `batch_norm=True`, the default).

    `example_inputs`: images [N, C, H, W], or several inputs. `budget`: a `ratio` or a `macs_ratio`; `min_fraction` keeps layers from being
    emptied. Where sizes that code writes hold what the budget needs, `pruner.model` is a torch.fx graph of the same layers from the start.
    `cut_error`: what a trial cut of every group was wrong by, relative, in float64; once `done`, of the last
    network as well, which has `rmprune_facts` like the result of `prune`. Raises InfeasibleBudget where limits forbid the budget,
    UnsupportedModel where nothing can be pruned or the network's own weights are computed from others, NotEquivalent where
    a cut would be wrong, ConfigError for an optimizer of another model or of a part of what is trained, that wraps another one, or that
    keeps parameters elsewhere (LBFGS), and for Taylor scores of frozen layers: all at once, before any step.

    >>> model = rmprune.models.create("resnet8", num_classes=10, width=8)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    >>> images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    >>> pruner = rmprune.Pruner(model, images, rmprune.Budget(macs_ratio=0.5), optimizer=optimizer, steps=4, cuts=2)
    >>> while not pruner.done:
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(pruner.model(images), labels).backward()
    ...     optimizer.step()
    ...     print(pruner.step())
    False
    True
    False
    True
    >>> rmprune.count_macs(pruner.model, images) / rmprune.count_macs(model, images) <= 0.5
    True
    """

    @tf32(False, "cuda")
    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        budget: Budget,
        *,
        optimizer: torch.optim.Optimizer,
        steps: int,
        cuts: int = 30,
        importance: str = "taylor",
    ) -> None:
        given = model
        model, inputs = as_given(model, example_inputs)
        steps, cuts = _counted("steps", steps), _counted("cuts", cuts)
        refuse_no_budget(budget)
        if budget.latency_ratio is not None or budget.memory_ratio is not None:
            raise ConfigError(
                "cuts in a loop of one's own count channels or MACs, no time and no memory; give ratio or macs_ratio alone"
            )
        if not hasattr(optimizer, "param_groups"):
            raise ConfigError(
                f"optimizer is of type {type(optimizer).__name__}; give the torch.optim.Optimizer that your loop steps"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in model.parameters()):
            if any(id(p) in held for p in given.parameters()):
                raise UnsupportedModel(
                    "weights that are computed from others (weight norm, masks, parametrizations), or wrappers inside the network, cannot "
                    "be cut while they train: make them numbers first (torch.nn.utils.parametrize.remove_parametrizations, "
                    "torch.nn.utils.remove_weight_norm), and the optimizer after that"
                )
            raise ConfigError("the optimizer holds no parameter of this model; make it of model.parameters()")
        _refuse_elsewhere(optimizer, model)
        _refuse_left_out(optimizer, model)
        model, _, structure = find_prunable(model, inputs, budget)
        if importance == "taylor":
            _refuse_without_gradients(optimizer, model, structure)
        self.cut_error = prove_groups(model, structure, inputs)
        self._hook = GradualPruner(
            model, inputs, budget, prune_epochs=steps, every=between_cuts(steps, cuts),
            importance=importance, structure=structure,
        )  # fmt: skip
        self._loop = TrainState(model, optimizer, TrainConfig(), 1, steps, 0.0)  # of a loop that knows no epochs
        self.optimizer = optimizer

    @property
    def model(self) -> nn.Module:
        """The network as it is now; until the first cut the one that was given, or its graph."""
        return self._loop.model

    @property
    def done(self) -> bool:
        """Whether the budget is met and no further cut comes."""
        return self._hook.done

    @tf32(False, "cuda")
    def step(self) -> bool:
        """Take up the gradients of the step just made, and cut where it is time; True where `model` is another module now.

        Raises DataError where no gradient reached `model` between two cuts, as where a loop goes on with the one before.
        """
        loop, before = self._loop, self._loop.model
        loop.step += 1
        self._hook(loop)
        if self.done:
            self.cut_error = max(self.cut_error, facts_of(loop.model).get("cut_error") or 0.0)
        if loop.model is before:
            return False
        for own, cut in zip(self.optimizer.param_groups, loop.optimizer.param_groups, strict=True):
            own["params"] = cut["params"]
        self.optimizer.state = loop.optimizer.state
        loop.optimizer = self.optimizer
        return True


def _counted(name: str, value: object) -> int:
    """A whole number of at least 1, as `len(loader) * epochs / 2` may be. Raises ConfigError."""
    whole = isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())
    if not whole or isinstance(value, bool) or int(value) < 1:  # type: ignore[call-overload]
        raise ConfigError(f"{name} is {value!r}; give a whole number of at least 1")
    return int(value)  # type: ignore[call-overload]


def _refuse_left_out(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise ConfigError where a parameter is trained by nobody, or by another optimizer: a cut makes all of them anew."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if left := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]:
        raise ConfigError(
            f"the optimizer does not hold {len(left)} of the parameters that are trained ({few(left)}), and another one would hold what "
            "the first cut leaves behind; give one optimizer of all of them, in groups with settings of their own, or freeze these "
            "(requires_grad_(False))"
        )


def _refuse_without_gradients(optimizer: torch.optim.Optimizer, model: nn.Module, structure: Structure) -> None:
    """Raise ConfigError where gradients say nothing about a layer, or where none is left after the optimizer's step."""
    layers = sorted({m.layer for group in structure.groups for m in group.readers})
    if frozen := [name for name in layers if is_frozen(model.get_submodule(name))]:
        raise ConfigError(
            f"importance 'taylor' ranks by gradients, and {few(frozen)} have none (requires_grad is False); rank by "
            "importance='magnitude', or train them, too"
        )
    for group in optimizer.param_groups:
        together = group.get("foreach") or (group.get("foreach") is None and any(p.is_cuda for p in group["params"]))
        if group.get("nesterov") and group.get("weight_decay") == 0 and together and not group.get("fused"):
            raise ConfigError(
                "SGD with nesterov=True and weight_decay=0 writes its momentum into the gradients that importance 'taylor' reads after the "
                "step; give it foreach=False"
            )


def _refuse_elsewhere(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise ConfigError for an optimizer that holds the parameters, or their state, where cuts do not reach them."""
    parameters, kind = {id(p) for p in model.parameters()}, type(optimizer).__name__
    for name, value in vars(optimizer).items():
        if name in ("param_groups", "state"):
            continue
        for each in tree_leaves([value, list(value) if isinstance(value, dict | set) else None]):
            if isinstance(each, torch.optim.Optimizer):
                raise ConfigError(
                    f"{kind} wraps another optimizer; give the one inside, optimizer.{name}, whose parameters are brought along"
                )
            if id(each) in parameters:
                raise ConfigError(
                    f"{kind} keeps parameters of its own beside its param_groups ({name}), as if sizes never changed; take one that keeps "
                    "its state by parameter, such as SGD or AdamW"
                )
