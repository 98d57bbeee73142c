"""The float64 twin of a user's network that everything is computed from and checked against. The original is left alone."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils import parametrize

from rmprune.errors import UnsupportedModel

_WEIGHT_HOOKS = ("WeightNorm", "SpectralNorm")


def reference_copy(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode on the CPU, without the user's hooks. The argument is left alone."""
    try:
        twin = copy.deepcopy(model).cpu().double().eval()
    except RuntimeError as error:
        raise UnsupportedModel(f"the network cannot be copied: {error}") from error
    return freeze(twin).requires_grad_(False)


def freeze(twin: nn.Module) -> nn.Module:
    """Weights that are computed from others (weight norm, spectral norm, parametrizations) become numbers; hooks go."""
    for module in twin.modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ in _WEIGHT_HOOKS:
                hook(module, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
    for module in list(twin.modules()):
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
            # Not remove_parametrizations: the copy shares its made-up class with the original, which that would damage.
            module.__class__ = type(module).__bases__[0]
            del module._modules["parametrizations"]
            for name, value in values.items():
                setattr(module, name, nn.Parameter(value))
    return twin


def has_hooks(model: nn.Module) -> bool:
    """Whether something listens to, or changes, what a module reads or returns."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(type(hook).__name__ not in _WEIGHT_HOOKS for hook in hooks)
