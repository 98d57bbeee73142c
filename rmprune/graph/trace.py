"""A network traced by torch.fx in terms of the listed layer types; the trace as it is, normalise.py cleans it up."""

import operator
from typing import Any

import torch
from torch import fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.vocabulary import LAYERS


class _Tracer(fx.Tracer):
    """Keeps the listed layer types whole and goes through everything else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__name__ in LAYERS and type(m) is LAYERS[type(m).__name__].cls

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """timm's batch norm with its activation inside is traced as a stock batch norm, then what follows it."""
        if not is_norm_with_activation(m):
            return super().call_module(m, forward, args, kwargs)
        x = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        for child in ("drop", "act"):
            if child in m._modules:
                x = m._modules[child](x)  # type: ignore[misc]
        return x


def is_norm_with_activation(module: nn.Module) -> bool:
    """Whether this is timm's BatchNormAct2d, which calls batch norm as a function and so hides it from every pass."""
    return type(module).__name__ == "BatchNormAct2d" and isinstance(module, nn.BatchNorm2d)


def stock_norm(module: nn.Module) -> nn.BatchNorm2d:
    """A stock BatchNorm2d that holds the tensors and children of timm's BatchNormAct2d, and does not call the
    children.
    """
    with torch.device("meta"):
        norm = nn.BatchNorm2d(**LAYERS["BatchNorm2d"].read(module))
    norm._parameters, norm._buffers, norm._modules = module._parameters, module._buffers, module._modules
    norm.training = module.training
    return norm


def trace(model: nn.Module) -> fx.Graph:
    """The torch.fx graph of `model` in terms of the listed layer types; assertions and dead code are dropped.

    Raises UnsupportedModel when torch.fx cannot follow the forward pass. The model is left as it was.
    """
    before = set(model.__dict__)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward code: anything may come out
        raise UnsupportedModel(
            f"{type(model).__name__}: torch.fx cannot trace it ({type(error).__name__}: {str(error)[:200]}); make the "
            "forward pass free of "
            "control flow that depends on values, or convert the part that traces"
        ) from error
    finally:
        constants = {name: model.__dict__.pop(name) for name in set(model.__dict__) - before}
    if constants:
        raise UnsupportedModel(
            f"{type(model).__name__}: the forward pass makes {len(constants)} tensor constant(s); register them as "
            "buffers of the module"
        )
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=_has_effect)
    return graph


def _has_effect(node: fx.Node) -> bool:
    """Whether a node whose result nobody reads must stay: layers keep statistics, in-place operations change their
    argument.
    """
    if node.op in ("placeholder", "output", "call_module"):
        return True
    name = str(getattr(node.target, "__name__", node.target))
    inplace_operator = node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    return name.endswith("_") or inplace_operator or True in (node.kwargs.get("inplace"), *node.args[1:])


def is_flat_sequential(model: nn.Module) -> bool:
    """Whether `model` is exactly an nn.Sequential whose children are all listed layer types."""
    return type(model) is nn.Sequential and all(
        type(child) is getattr(LAYERS.get(type(child).__name__), "cls", None) for child in model._modules.values()
    )
