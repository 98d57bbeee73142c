"""Batch norms folded into the convolutions and linear layers before them, in eval mode; the function stays."""

from collections import Counter
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from rmprune.graph.copied import copied
from rmprune.graph.foreign import plain_module, unbound
from rmprune.graph.inputs import as_tuple, trial
from rmprune.graph.listed import is_flat_sequential, is_norm_with_activation, stock_norm, traced
from rmprune.graph.network import GONE, named
from rmprune.graph.run import hooked
from rmprune.graph.tracing import warn_of_left_out

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(model: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> nn.Module:
    """A copy of `model` in eval mode in which every batch norm right after a convolution or linear layer is folded into
    it.

    inputs: examples, for code that asks for their sizes (`trace`), and to tell vectors (N, C) from tokens (N, L, C), whose
    dimension 1 a BatchNorm1d takes: without them it stays behind a linear layer.
    Works on flat nn.Sequentials and on whatever torch.fx traces (UnsupportedModel otherwise). A batch norm stays where
    its input is also read elsewhere, where the layer before runs more than once, or where it has no running statistics.
    Dropout and Identity go as well.
    """
    model = unbound(copied(plain_module(model))).eval()
    flat, (graph, _, autocast, _) = is_flat_sequential(model), traced(model, inputs)
    warn_of_left_out(tuple(autocast))  # nothing folded is trained
    for name, module in list(model.named_modules()):
        if is_norm_with_activation(module):
            model.set_submodule(name, stock_norm(module))
    vectors = set() if inputs is None else _norms_of_vectors(model, inputs)
    graph_module = fx.GraphModule(model, graph)
    modules = dict(graph_module.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        module, source = modules[node.target], node.args[0] if node.args else None
        if named(module, GONE) and isinstance(source, fx.Node):
            _bypass(graph, node, source)
        elif isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1:
            before = modules[source.target]
            fits = not isinstance(before, nn.Linear) or node.target in vectors
            if calls[source.target] == calls[node.target] == 1 and fits and _foldable(before, module):
                fuse: Any = fuse_linear_bn_eval if isinstance(before, nn.Linear) else fuse_conv_bn_eval
                modules[source.target] = fuse(before, module)
                graph_module.set_submodule(str(source.target), modules[source.target])
                inside = nn.Module()  # timm keeps the activation inside the norm
                inside._modules = module._modules
                graph_module.set_submodule(str(node.target), inside)
                _bypass(graph, node, source)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    unbound(graph_module)
    return _chain(graph_module) if flat else graph_module


def _norms_of_vectors(model: nn.Module, inputs: tuple[Tensor, ...]) -> set[str]:
    """The batch norms of `model` that read (N, C)."""
    found: set[str] = set()

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].dim() == 2:
            found.add(name)

    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d)}
    with hooked(module.register_forward_pre_hook(partial(note, name)) for name, module in norms.items()):
        if norms:
            trial(model, as_tuple(model, inputs))
    return found


def _bypass(graph: fx.Graph, node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    graph.erase_node(node)


def _chain(graph_module: fx.GraphModule) -> nn.Sequential:
    """The modules in the order of their calls, under their names; a module that is called again under the name of that call."""
    result = nn.Sequential()
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            name = str(node.target) if str(node.target) not in result._modules else node.name
            result.add_module(name, graph_module.get_submodule(str(node.target)))
    return result.eval()


def _foldable(before: nn.Module | None, norm: nn.Module) -> bool:
    if not isinstance(norm, _NORMS) or norm.running_mean is None:
        return False
    return isinstance(before, _CONVS) or (isinstance(before, nn.Linear) and isinstance(norm, nn.BatchNorm1d))
