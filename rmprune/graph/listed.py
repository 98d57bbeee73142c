"""A network as a torch.fx graph in terms of the listed layer types (vocabulary.py), for files and clocks; removal reads normalise.py's."""

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from rmprune.errors import UnsupportedModel
from rmprune.graph.calls import writes
from rmprune.graph.fx_tracer import Tracer
from rmprune.graph.names import refuse_taken, spell
from rmprune.graph.shapes import WithoutValues, blank_inputs, to_run
from rmprune.graph.tensors import own_tensors
from rmprune.graph.tracing import Traced, follow
from rmprune.graph.vocabulary import LAYERS


class _Tracer(Tracer):
    """Keeps the listed layer types whole and goes through everything else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__name__ in LAYERS and type(m) is LAYERS[type(m).__name__].cls

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """timm's batch norm with its activation inside is traced as a stock batch norm, then what follows it.

        Layers of torch that are not listed and cannot be gone through (recurrent ones) stay whole; others go by their name.
        """
        if is_norm_with_activation(m) and not self.aside:
            x = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
            for child in ("drop", "act"):
                if child in m._modules:
                    x = m._modules[child](x)  # type: ignore[misc]
            return x
        depth = len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if not fx.Tracer.is_leaf_module(self, m, ""):
                raise
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class _BufferTracer(_Tracer):
    """Also what is computed of buffers alone is in the graph; then a buffer decides nothing."""

    proxy_buffer_attributes = True


def is_norm_with_activation(module: nn.Module) -> bool:
    """Whether this is timm's BatchNormAct2d, which calls batch norm as a function and so hides it from every pass."""
    return type(module).__name__ == "BatchNormAct2d" and isinstance(module, nn.BatchNorm2d)


def stock_norm(module: nn.Module) -> nn.BatchNorm2d:
    """A stock BatchNorm2d that holds the tensors and children of timm's BatchNormAct2d, and does not call the children."""
    with torch.device("meta"):
        norm = nn.BatchNorm2d(**LAYERS["BatchNorm2d"].read(module))
    norm._parameters, norm._buffers, norm._modules = module._parameters, module._buffers, module._modules
    norm.training = module.training
    return norm


def trace(model: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> fx.Graph:
    """The torch.fx graph of `model` in terms of the listed layer types; assertions and dead code are dropped.

    inputs: examples, whose sizes decide where the code asks for sizes. Raises UnsupportedModel when torch.fx cannot follow the
    forward pass. The model is left as it was.
    """
    return traced(model, inputs).graph


def traced(model: nn.Module, inputs: tuple[Tensor, ...] | None) -> Traced:
    """`trace`, with where sizes of the inputs decided what is in the graph, and what is not in it. Raises UnsupportedModel where it makes
    tensors of its own."""
    for kind in (_Tracer, _BufferTracer):
        before = set(model.__dict__)
        try:
            found = follow(kind, model, inputs)
        finally:
            constants = {name: model.__dict__.pop(name) for name in set(model.__dict__) - before}
        if not constants:
            break
    if constants:
        raise UnsupportedModel(
            f"{type(model).__name__}: the forward pass makes {len(constants)} tensor constant(s); register them as "
            "buffers of the module"
        )
    stay = ("placeholder", "output", "call_module")  # layers keep statistics
    found.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in stay or writes(node))
    if not isinstance(model, fx.GraphModule):
        refuse_taken(model)
    spell(found.graph)
    return found


def holders(model: nn.Module, graph: fx.Graph) -> Counter[int]:
    """By the id of each parameter and buffer: how many modules hold it, and how often the code that `graph` is of reads it by itself."""
    read = [operator.attrgetter(str(node.target))(model) for node in graph.nodes if node.op == "get_attr"]
    return Counter(map(id, [*read, *(tensor for module in model.modules() for _, tensor in own_tensors(module))]))


def shaped(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """The network as `trace` reads it, in float32 without values, and node.meta["tensor_meta"] as it is for the images `x`."""
    module = fx.GraphModule(to_run(model, torch.float32), trace(model))
    with torch.no_grad(), WithoutValues():
        ShapeProp(module).propagate(*blank_inputs((x,), torch.float32))
    return module


def is_flat_sequential(model: nn.Module) -> bool:
    """Whether `model` is exactly an nn.Sequential whose children are all listed layer types."""
    return type(model) is nn.Sequential and all(
        type(child) is getattr(LAYERS.get(type(child).__name__), "cls", None) for child in model._modules.values()
    )
