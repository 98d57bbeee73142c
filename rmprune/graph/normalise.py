"""A user's network as a graph of stock modules with known shapes. Finds and rewrites nothing."""

import copy
import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from rmprune.errors import UnsupportedModel
from rmprune.graph.calls import DROPOUT_CALLS, MULTIPLICATIONS, is_size, module_around
from rmprune.graph.convolution import plain
from rmprune.graph.double import InDouble
from rmprune.graph.functional import NORMS, linear_pool, modules_for
from rmprune.graph.fx_tracer import Tracer
from rmprune.graph.in_place import undo_in_place
from rmprune.graph.network import DROPOUTS, GONE, GROUP_NORMS, WHOLE, Network, NodeLayer, free_name, named, shape_of
from rmprune.graph.randomness import draws, is_pure, refuse_drawn, refuse_random
from rmprune.graph.run import node_value
from rmprune.graph.shapes import propagate_shapes
from rmprune.graph.sums import spell_out
from rmprune.graph.tracing import follow
from rmprune.graph.written_out import as_layers

_TRANSFORMERS = (  # of torch, but made of layers that can be cut
    nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer,
)  # fmt: skip


class PlainTracer(Tracer):
    """Leaves stock modules whole (transformers where `whole` says so), and classes that merely inherit a stock forward."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if named(m, WHOLE):
            return True
        if isinstance(m, _TRANSFORMERS) and not self.whole:
            return False
        kind = next((c for c in type(m).__mro__ if c.__module__ == _ConvNd.__module__), nn.Module)
        inherited = isinstance(m, _ConvNd) and plain(m, kind)
        return inherited or super().is_leaf_module(m, module_qualified_name)


def normalise(
    model: nn.Module, example_inputs: tuple[Tensor, ...], *, pieces: bool = True, dropout: bool = False
) -> Network:
    """Traces a float64 eval-mode network (`reference_copy`) into stock modules, with shapes.

    `pieces`: write what `chunk` and `split` give as slices of these sizes, cat(x, zeros) as padded channels and activations that code
    writes out as modules (False: leave them, which other sizes follow). `dropout`: keep that of what are no maps, as in heads; without
    it all is left out, and noted, since in eval mode it does nothing.

    Raises UnsupportedModel where torch.fx cannot follow the code, or where the inputs do not fit.
    """
    drawn = draws()
    traced, decided, autocast, frozen = follow(PlainTracer, model, example_inputs)
    if draws() != drawn:
        refuse_drawn(model, example_inputs)
    written = _as_written(model, traced) if decided else []
    undo_in_place(traced, dict(model.named_modules()))
    if pieces:
        spell_out(traced)
    network = _Normaliser(model, traced, example_inputs, dropout).run(unread=not pieces)
    refuse_random(network)
    propagate_shapes(network, example_inputs)
    _drop_of_maps(network)
    if pieces:
        as_layers(network)
        network.drop_unread()
        _refuse_fixed_batch(model, written, decided, example_inputs)
    network.decided, network.autocast, network.frozen = decided, autocast, frozen
    return network


class _Normaliser:
    def __init__(self, model: nn.Module, traced: fx.Graph, inputs: tuple[Tensor, ...], dropout: bool) -> None:
        self.modules = dict(model.named_modules())
        self.model = model
        self.traced = traced
        self.network = Network(fx.Graph())
        self.env: dict[fx.Node, fx.Node] = {}
        self.twins: dict[tuple[fx.Node, str], fx.Node] = {}
        self.known: dict[fx.Node, Tensor] = {}  # parameters, buffers, and what is made of them alone
        self.inputs, self.dropout = inputs, dropout

    @functools.cached_property
    def shapes(self) -> dict[fx.Node, tuple[int, ...] | None]:
        """Of what is traced, for the few calls that do another thing for another number of dimensions; nothing where it cannot be run."""
        layers: dict[str, NodeLayer] = {**self.modules}
        tensors = [node.target for node in self.traced.nodes if node.op == "get_attr"]
        constants = {str(name): operator.attrgetter(str(name))(self.model) for name in tensors}
        try:
            propagate_shapes(Network(self.traced, layers, constants), self.inputs)
        except UnsupportedModel:
            return {}
        return {node: shape_of(node) for node in self.traced.nodes}

    def run(self, unread: bool) -> Network:
        """`unread`: keep layers whose results nobody reads; they run all the same, and go with their inputs."""
        for node in self.traced.nodes:
            if node.op == "call_module":
                self._module(node)
            elif node.op in ("call_function", "call_method"):
                self._call(node)
            elif node.users or node.op != "get_attr":  # code may look at a parameter and go on without it
                self._keep(node)
        self.network.drop_unread(layers=not unread)
        return self.network

    def _module(self, node: fx.Node) -> None:
        module = self.modules[str(node.target)]
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            self._keep(node)
        elif self.dropout and named(module, DROPOUTS):
            module = copy.copy(module)
            module.inplace = False
            self._put(node, [module])
        elif named(module, ("FrozenBatchNorm2d", "SyncBatchNorm")) and module.running_mean is not None:
            self._put(node, [plain_norm(module, NORMS.get(len(self.shapes.get(node.args[0]) or ()), nn.BatchNorm2d))])
        else:
            if named(module, GONE) and (getattr(module, "p", None) or getattr(module, "drop_prob", None)):
                self.network.dropped.append(str(node.target))
            self._put(node, _stock(module))

    def _call(self, node: fx.Node) -> None:
        if self._folded(node):
            return
        first = node.args[0] if node.args else None
        if (
            node.target in MULTIPLICATIONS
            and len(node.args) == 2
            and (not isinstance(first, fx.Node) or first in self.known)
        ):
            node.args = (node.args[1], node.args[0])  # 0.5 * x, gain * x
        if node.target in (operator.add, torch.add) and len(node.args) == 2 and not node.kwargs:
            for zero, other in (node.args, node.args[::-1]):
                if isinstance(other, fx.Node) and type(zero) in (int, float) and zero == 0 and not is_size(other):
                    self.env[node] = self.env[other]  # sum([x, y]) starts from 0
                    return
        found = modules_for(node, self._constant, self.shapes_of)
        if found == [] and node.target in DROPOUT_CALLS:
            self.network.dropped.append(_own_name(node))
        if found is None:
            self._keep(node)
        else:
            self._put(node, [module.double().eval() for module in found], _own_name(node))

    def shapes_of(self, node: fx.Node) -> tuple[int, ...] | None:
        """Of the value of a traced node, where it is known."""
        return self.shapes.get(node)

    def _constant(self, value: Any) -> Any:
        return self.known.get(value, value) if isinstance(value, fx.Node) else value

    @torch.no_grad()
    def _folded(self, node: fx.Node) -> bool:
        """Whether a call reads nothing but parameters and buffers and has no effect: gamma.view(1, -1, 1, 1) is a tensor, too."""
        sources = node.all_input_nodes
        if not sources or not all(source in self.known for source in sources) or not is_pure(node):
            return False
        with InDouble():
            value = node_value(node, self.known.__getitem__, self.known.__getitem__)
        if not isinstance(value, Tensor):
            return False
        if any(isinstance(self.known[source], nn.Parameter) for source in sources):
            value = nn.Parameter(value, requires_grad=False)
        target = free_name(node.name, self.network.constants)
        self.known[node] = self.network.constants[target] = value
        self.env[node] = self._annotated(self.network.graph.create_node("get_attr", target), node)
        return True

    def _put(self, node: fx.Node, modules: list[nn.Module], name: str | None = None) -> None:
        current = self.env[node.args[0]] if isinstance(node.args[0], fx.Node) else None
        assert current is not None, node
        for module in modules:
            settings = {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
            key = (current, f"{module} {settings}")  # a repr may leave settings out (AvgPool2d's ceil_mode)
            if (
                key in self.twins
                and not named(module, DROPOUTS)
                and not list(module.parameters())
                and not list(module.buffers())
            ):
                current = self.twins[key]  # relu(x) written twice is one value
                continue
            suffix = "" if module is modules[0] else "_" + type(module).__name__.lower()
            target = self.network.add((name or str(node.target)) + suffix, module)
            current = self.twins[key] = self._annotated(self.network.graph.call_module(target, (current,)), node)
        self.env[node] = current

    def _keep(self, node: fx.Node) -> None:
        copied = self.network.graph.node_copy(node, lambda n: self.env[n])
        self.env[node] = copied
        if node.op == "call_module":
            copied.target = self.network.add(str(node.target), self.modules[str(node.target)])
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.model)
            if isinstance(value, Tensor):
                self.known[node] = self.network.constants[str(node.target)] = value

    def _annotated(self, new: fx.Node, old: fx.Node) -> fx.Node:
        new.meta = dict(old.meta)
        return new


def _own_name(node: fx.Node) -> str:
    prefix, _ = module_around(node)
    plain = node.name.rstrip("0123456789").rstrip("_")
    return f"{prefix}.{plain}" if prefix else plain


def _stock(module: nn.Module) -> list[nn.Module]:
    """What a module does in eval mode, as stock modules."""
    if named(module, GONE):
        return []
    if named(module, ("BatchNormAct2d",)):
        return [plain_norm(module), *_stock(module.drop), *_stock(module.act)]  # type: ignore[arg-type]
    if named(module, GROUP_NORMS) and type(module) is not nn.GroupNorm:
        return [plain_norm(module), *(layer for part in module.children() for layer in _stock(part))]  # drop and act
    if type(module) is nn.MaxPool2d:
        return [linear_pool(module)]
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False  # type: ignore[assignment]
    return [module]


def plain_norm(module: Any, kind: Any = nn.BatchNorm2d) -> nn.Module:
    """A stock batch norm, of this kind, or group norm with the tensors of timm's, or of a batch norm whose numbers are frozen or are those
    of several processes."""
    plain: Any
    if isinstance(module, nn.GroupNorm):
        plain = nn.GroupNorm(module.num_groups, module.num_channels, module.eps, module.affine, dtype=torch.float64)
    else:
        plain = kind(len(module.running_mean), eps=module.eps, dtype=torch.float64)
        plain.running_mean, plain.running_var = module.running_mean, module.running_var
    for name in ("weight", "bias"):
        value = getattr(module, name)
        if value is not None:  # the same parameter, by which its owner is known
            setattr(plain, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False))
    norm: nn.Module = plain.eval()
    return norm


def _drop_of_maps(network: Network) -> None:
    """Takes dropout of maps out, which stands in the way of rewriting, and notes where it was."""
    for node in list(network.graph.nodes):
        layer = network.layer(node)
        if isinstance(layer, nn.Module) and named(layer, DROPOUTS) and len(shape_of(node) or ()) == 4:
            if layer.p > 0:  # type: ignore[operator]
                network.dropped.append(str(node.target))
            network.bypass(node, node.args[0])


def _refuse_fixed_batch(model: nn.Module, written: list[Any], decided: list[str], inputs: tuple[Tensor, ...]) -> None:
    """Sizes that decide may be those of the batch; then it runs for batches of this size only, and nothing can be checked."""
    if decided and written != _as_written(
        model, follow(PlainTracer, model, tuple(torch.cat([x, x[:1]]) for x in inputs)).graph
    ):
        raise UnsupportedModel(
            f"the code asks for sizes ({'; '.join(decided)}), and so the size of the batch is written into the network: one image more "
            "is another computation; make what depends on it of tensors (zeros_like, new_zeros, x.view(-1, ...)), and loop over no images"
        )


def _as_written(model: nn.Module, graph: fx.Graph) -> list[Any]:
    """A graph in words that do not depend on the names of its nodes and constants."""
    places = {node: f"%{place}" for place, node in enumerate(graph.nodes)}

    def target(node: fx.Node) -> Any:
        value = operator.attrgetter(str(node.target))(model) if node.op == "get_attr" else None
        return tuple(value.shape) if isinstance(value, Tensor) else node.target

    return [(node.op, target(node), str(fx.map_arg((node.args, node.kwargs), places.get))) for node in graph.nodes]
