"""A network read once for pruning: its normalised graph, and which of the user's modules each layer in it is."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.foreign import freeze, reference_copy
from rmprune.graph.inputs import Inputs, as_tuple
from rmprune.graph.network import Network, NodeLayer, is_batch_norm, shape_of
from rmprune.graph.normalise import normalise, plain_norm
from rmprune.graph.shapes import on_meta, propagate_shapes
from rmprune.graph.tensors import own_tensors
from rmprune.pruning.layers import Weighted, channels_read
from rmprune.pruning.written_sizes import agree


@dataclass(frozen=True)
class Reading:
    """`network`: the normalised graph of a float64 copy in eval mode, `owners`: {id of a module or tensor of it: the user's module}."""

    network: Network
    owners: Mapping[int, str]
    inputs: tuple[Tensor, ...]
    written: frozenset[str] = frozenset()  # nodes of the user's graph, whose numbers a cut can write anew

    def owner(self, layer: NodeLayer | None) -> str | None:
        """The name of the user's module whose tensors a layer has; None where it has none, or is made up for a function."""
        own = isinstance(layer, nn.Module) and (
            channels_read(layer) is not None or any(True for _ in own_tensors(layer))
        )
        if own and id(layer) in self.owners:
            return self.owners[id(layer)]
        held = "weight" if isinstance(layer, nn.GroupNorm) else "running_mean"
        return self.owners.get(id(getattr(layer, held, self)))

    def name(self, node: fx.Node) -> str | None:
        """The name of the user's module that a node calls."""
        return self.owner(self.network.layer(node))

    def of(self, model: nn.Module) -> Network:
        """The graph with the layers of `model`, which has the same modules at other widths; its nodes are given the shapes there."""
        layers = dict(self.network.layers)
        for target, layer in layers.items():
            name = self.owner(layer)
            if name is not None:
                module = model.get_submodule(name)
                layers[target] = module if type(module) is type(layer) else plain_norm(module, type(layer))
        network = replace(self.network, layers=layers)
        if isinstance(model, fx.GraphModule):
            agree(network.graph, model.graph)
        propagate_shapes(network, self.inputs)
        return network

    def joined_norms(self) -> dict[fx.Node, fx.Node]:
        """{batch norm: the convolution or linear layer before it, whose outputs nothing else reads}."""
        found = {}
        calls = Counter(self.name(node) for node in self.network.graph.nodes)
        for node in self.network.graph.nodes:
            if is_batch_norm(self.network.layer(node)) and self.name(node) is not None:
                (before,) = node.all_input_nodes
                layer = self.network.layer(before)
                # Where they are no features, the norm's are tokens.
                features = not isinstance(layer, nn.Linear) or len(shape_of(before) or ()) == 2
                once = calls[self.name(node)] == calls[self.name(before)] == len(before.users) == 1
                if isinstance(layer, Weighted) and self.owner(layer) and once and features:
                    found[node] = before
        return found


def read(model: nn.Module, example_inputs: Inputs, *, values: bool = False) -> Reading:
    """The network as it runs on the first of these images. `values`: with its weights; else it is read on the meta device, at no cost.

    Raises UnsupportedModel where torch.fx cannot follow it, where it cannot be copied, and for inputs that are no batch.
    """
    try:
        twin = reference_copy(model) if values else freeze(on_meta(model).double().eval()).requires_grad_(False)
    except RuntimeError as error:
        raise UnsupportedModel(f"the network cannot be copied: {error}") from error
    owners = {
        id(part): name
        for name, module in twin.named_modules()
        for part in (module, *(t for _, t in own_tensors(module)))
    }
    inputs = tuple(x[:1] for x in as_tuple(model, example_inputs))
    network = normalise(twin, inputs, pieces=False)
    written = {n.name for n in model.graph.nodes} if isinstance(model, fx.GraphModule) else ()
    return Reading(network, owners, inputs, frozenset(written))
