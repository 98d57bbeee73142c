"""One cut by Torch-Pruning at a ratio of channels: what must stay out of its reach, and what it left of each tensor. Searches for no ratio.

The package is imported where it is needed: it takes half a second.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.copied import copied
from rmprune.graph.run import evaluating
from rmprune.graph.tensors import named_tensors
from rmprune.pruning.groups import Structure
from rmprune.pruning.layers import Slices

if TYPE_CHECKING:
    import torch_pruning as tp

OUT_OF_REACH = 1e12  # above any score of a channel that may go
COUPLED_IMPORTANCES = {
    "batch_norm": "BNScaleImportance",
    "taylor": "GroupTaylorImportance",
    "magnitude": "GroupMagnitudeImportance",
}
"""{name: class of Torch-Pruning's}."""


@contextlib.contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """Whatever Torch-Pruning raises on a network that it does not know becomes an UnsupportedModel."""
    try:
        yield
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__}: Torch-Pruning cannot follow this network ({type(error).__name__}: {error})"
        ) from error


def cut_at(
    model: nn.Module, example_inputs: Tensor, structure: Structure, importance: str, isomorphic: bool,
    gradients: Mapping[str, Tensor], least: Mapping[str, int], round_to: int, ratio: float,
) -> tuple[nn.Module, dict[str, Slices]]:  # fmt: skip
    """Torch-Pruning's cut at this ratio, and what it left of each tensor."""
    import torch_pruning as tp

    twin = copied(model)
    parameters = dict(twin.named_parameters())
    twin.requires_grad_(True)  # Torch-Pruning traces by autograd
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.clone()
    floors: dict[str, tuple[int, int]] = {}
    for group in structure.groups:
        floors |= dict.fromkeys(group.producers, (least[group.name], group.multiple))
    names = {module: name for name, module in twin.named_modules()}
    makes_channels = tp.DependencyGraph().is_out_channel_pruning_fn
    going = {name for group in structure.groups for name in group.producers}
    staying = [x.name for x in structure.layers if x.kind not in ("depthwise", "rest") and x.name not in going]
    with following(model), evaluating(twin), torch.enable_grad():
        pruner = tp.pruner.BasePruner(
            twin, example_inputs.clone(),
            importance=_Protecting(getattr(tp.importance, COUPLED_IMPORTANCES[importance])(), floors, names, makes_channels),
            global_pruning=True, isomorphic=isomorphic, pruning_ratio=ratio,
            ignored_layers=[twin.get_submodule(name) for name in staying], round_to=round_to if round_to > 1 else None,
        )  # fmt: skip
        groups = pruner.step(interactive=True)
        first = next(groups, None)  # all is ranked by now
        for tensor in _tensors(twin).values():  # every entry becomes its own position: what is cut now says what it was
            tensor.grad = None
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
        for group in itertools.chain([] if first is None else [first], groups):
            group.prune()
    for name, parameter in model.named_parameters():
        twin.get_parameter(name).requires_grad_(parameter.requires_grad)
    return twin, _renumbered(twin, model)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in named_tensors(model).items() if tensor.dim() and tensor.is_floating_point()
    }


def _renumbered(twin: nn.Module, model: nn.Module) -> dict[str, Slices]:
    """Puts the entries of `model` back where their positions are, and says which indices of each tensor are left."""
    slices: dict[str, Slices] = {}
    whole = _tensors(model)
    for name, tensor in _tensors(twin).items():
        at, shape = tensor.data.long(), whole[name].shape
        left = []
        for dim in range(min(2, at.dim())):
            if at.shape[dim] < shape[dim]:
                along = at.movedim(dim, 0).flatten(1)[:, 0] if at.dim() > 1 else at
                left.append((dim, along // math.prod(shape[dim + 1 :]) % shape[dim]))
        if left:
            slices[name] = tuple(left)
        tensor.data = whole[name].detach().flatten()[at]
    return slices


class _Protecting:
    """A Torch-Pruning importance that ranks as many channels of each group as must stay above everything else.

    Ties are broken, evenly over the groups: Torch-Pruning would remove all channels that tie with its threshold.
    """

    def __init__(
        self, inner: "tp.importance.Importance", floors: dict[str, tuple[int, int]], names: dict[nn.Module, str],
        makes_channels: Callable[[Callable[..., Any]], bool],
    ) -> None:  # fmt: skip
        self.inner, self.floors, self.names, self.makes_channels = inner, floors, names, makes_channels
        self.calls = 0

    def __call__(self, group: "tp.Group") -> Tensor | None:
        scores = self.inner(group)
        made_by = [
            self.names.get(item.dep.target.module, "") for item in group.items if self.makes_channels(item.dep.handler)
        ]  # a group begins at any of its layers, a depthwise one too, and names those that read it as well
        found = [self.floors[name] for name in made_by if name in self.floors]
        if scores is None or not found:
            return scores
        units, parts = found[0]
        self.calls += 1
        folded = scores.double().view(parts, -1)  # Torch-Pruning averages the parts of a grouped convolution
        place = torch.arange(folded.shape[1], 0, -1).to(folded) / folded.shape[1]
        folded = folded + 1e-9 * place + 1e-12 * self.calls
        best = folded.mean(0).argsort(descending=True)[:units]
        # No ties: those would all be removed or none.
        folded[:, best] = OUT_OF_REACH * torch.arange(units, 0, -1).to(folded)
        return folded.flatten()
