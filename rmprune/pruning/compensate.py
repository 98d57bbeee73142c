"""What the removed channels gave on the mean, folded into the layers that read them: the least-squares intercept of a cut."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from rmprune.data.batches import NOT_RUN, Batches, watch_passes
from rmprune.errors import DataError
from rmprune.graph.copied import copied
from rmprune.pruning.constants import add_to_bias, response
from rmprune.pruning.dead import Folded
from rmprune.pruning.groups import Keep, Structure
from rmprune.pruning.layers import channel_rows


def removed_means(folded: Folded, data: Batches | None) -> dict[str, Tensor]:
    """{layer: [c_in], the mean of each input channel}: measured on `data`; without it only constants are known."""
    if data is not None:
        return mean_inputs(folded.model, {m.layer for g in folded.structure.groups for m in g.consumers}, data)
    return {n: v.nan_to_num(0.0) for n, v in folded.constants.inputs.items()}


def compensated(
    model: nn.Module, structure: Structure, keep: Keep, means: Mapping[str, Tensor], norms: Mapping[str, str]
) -> nn.Module:
    """A copy in which the mean contribution of the removed channels is in their readers' batch norms (`norms`) or biases, which are made
    where there are none. Where a reader pads with zeros, its border is given as much as what lies inside."""
    if not any(bool(v.any()) for v in means.values()):
        return model
    result = copied(model)
    for group in structure.groups:
        gone = ~keep[group.name] if group.name in keep else torch.zeros(group.units, dtype=torch.bool)
        for member in group.consumers if bool(gone.any()) else ():
            layer = result.get_submodule(member.layer)
            if member.layer not in means:
                continue
            value = torch.zeros(member.size, dtype=torch.float64)
            index = member.index[gone].flatten()
            value[index] = means[member.layer][index]
            if bool(value.any()):
                add_to_bias(result, member.layer, response(layer, value), norms.get(member.layer))
    return result


def mean_inputs(model: nn.Module, layers: Iterable[str], data: Batches) -> dict[str, Tensor]:
    """{layer: [c_in] float64, the mean of each input channel over images and positions}, in eval mode. Raises DataError where a loss runs
    no network."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = channel_rows(inputs[0], layer)
        total = x.double().sum(1)
        sums[name] = total if name not in sums else sums[name] + total
        counts[name] = counts.get(name, 0) + x.shape[1]

    hooks = (model.get_submodule(name).register_forward_pre_hook(partial(record, name)) for name in layers)
    watch_passes(data, model, hooks)
    if not sums:
        raise DataError(NOT_RUN)
    return {name: total.cpu() / counts[name] for name, total in sums.items()}
