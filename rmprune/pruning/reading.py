"""A network read once for pruning: its normalised graph, and which of the user's modules each layer in it is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.equivalence import freeze, reference_copy
from rmprune.graph.network import Network, NodeLayer, is_batch_norm
from rmprune.graph.normalise import normalise, plain_norm
from rmprune.graph.shapes import on_meta, propagate_shapes


@dataclass(frozen=True)
class Reading:
    """`network`: the normalised graph of a float64 copy in eval mode, `owners`: {id of a module or tensor of it: the user's module}."""

    network: Network
    owners: Mapping[int, str]
    inputs: tuple[Tensor, ...]

    def owner(self, layer: NodeLayer | None) -> str | None:
        """The name of the user's module whose tensors a layer has; None where it has none, or is made up for a function."""
        found = (
            self.owners.get(id(layer)) if isinstance(layer, nn.Module) and any(True for _ in _tensors(layer)) else None
        )
        return found or self.owners.get(id(getattr(layer, "running_mean", self)))

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
                layers[target] = module if type(module) is type(layer) else plain_norm(module)
        network = replace(self.network, layers=layers)
        propagate_shapes(network, self.inputs)
        return network

    def joined_norms(self) -> dict[fx.Node, fx.Node]:
        """{batch norm: the convolution or linear layer before it, whose outputs nothing else reads}."""
        found = {}
        for node in self.network.graph.nodes:
            if is_batch_norm(self.network.layer(node)) and self.name(node) is not None:
                (before,) = node.all_input_nodes
                layer = self.network.layer(before)
                if isinstance(layer, nn.Conv2d | nn.Linear) and self.owner(layer) and len(before.users) == 1:
                    found[node] = before
        return found


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def read(model: nn.Module, example_inputs: Tensor, *, values: bool = False) -> Reading:
    """The network as it runs on the first of these images. `values`: with its weights; else it is read on the meta device, at no cost.

    Raises UnsupportedModel where torch.fx cannot follow it, where it cannot be copied, and for more inputs than one.
    """
    if not isinstance(example_inputs, Tensor):
        raise UnsupportedModel("pruning takes networks with one input, a tensor; example_inputs is none")
    try:
        twin = reference_copy(model) if values else freeze(on_meta(model).double().eval()).requires_grad_(False)
    except RuntimeError as error:
        raise UnsupportedModel(f"the network cannot be copied: {error}") from error
    owners = {id(part): name for name, module in twin.named_modules() for part in (module, *_tensors(module))}
    inputs = (example_inputs[:1],)
    return Reading(normalise(twin, inputs, pieces=False), owners, inputs)
