"""Layers that run in training alone, such as auxiliary heads: the graph that is cut, in eval mode, does not have them. Cuts nothing."""

import logging
from collections import Counter

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmprune.graph.shapes import WithoutValues, blank_inputs, on_meta
from rmprune.graph.tensors import floating_dtype, own_tensors
from rmprune.pruning.groups import Structure
from rmprune.pruning.named import few
from rmprune.pruning.reading import Reading
from rmprune.pruning.surgery import shrink

logger = logging.getLogger("rmprune")


def read_in_training(model: nn.Module, structure: Structure, reading: Reading) -> dict[str, str]:
    """{group: why it stays}: those without some of whose channels the network does not run in training mode.

    Tried on the meta device, and only where a layer is not in the graph; where training mode does not run there, the log names such layers.
    """
    unread = _unread(model, reading)
    if not unread:
        return {}
    twin = on_meta(model).train()
    for module in twin.modules():
        if isinstance(module, _BatchNorm):  # which costs most there, and changes no shape
            module.eval()
    if not _runs(twin, reading):
        logger.warning(
            "prune: eval mode does not run %s, and training mode could not be tried: if it does, channels that they read may go; name in "
            "`ignore` the layers that make those",
            few(unread),
        )
        return {}
    keep = {  # of each another number, so that those which meet differ
        group.name: torch.arange(group.units) < group.units - 1 - place % (group.units - 1)
        for place, group in enumerate(structure.groups)
        if group.units > 1
    }
    fits = lambda cut: _runs(shrink(twin, cut, structure)[0], reading)  # noqa: E731
    if fits(keep):
        return {}
    why = f"only training runs what reads them ({few(unread)})"
    return {name: why for name, mask in keep.items() if not fits({name: mask})}


def _unread(model: nn.Module, reading: Reading) -> list[str]:
    """The modules with parameters, or buffers, that the graph neither calls nor reads the tensors of."""
    called = {reading.name(node) for node in reading.network.graph.nodes} - {None}
    beside = Counter(reading.owners.get(id(tensor)) for tensor in reading.network.constants.values())
    return [
        name or type(model).__name__
        for name, module in model.named_modules()
        if sum(1 for _ in own_tensors(module)) > beside[name]
        and name not in called
        and not any(name.startswith(f"{around}.") for around in called)
    ]


@torch.no_grad()
def _runs(twin: nn.Module, reading: Reading) -> bool:
    try:
        with WithoutValues():
            twin(*blank_inputs(reading.inputs, floating_dtype(twin)))
    except Exception:  # what else code does in training mode is the user's
        return False
    return True
