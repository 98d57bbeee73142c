"""Network slimming (Liu et al. 2017): an L1 pull on batch-norm scales while training. It ranks and removes nothing.

The pull is a proximal step, a soft threshold after the optimizer's step, so idle scales become exactly 0 where a
subgradient only hovers around it. Its strength is stated for the whole run: step t pulls by `strength * lr_t / sum(lr)`
(that is lr_t * lambda), so a scale that the loss leaves alone moves by `strength` in total whatever the schedule.

What ranks the copies that RM reserves: by default the scale that RM gives the batch norm of a reserved channel,
sqrt(var) of the value it carries. That is the standard deviation of the channel before the activation, the very unit of
a trained scale, so both can be ranked in one list, and it costs no extra training. `add_shortcut_scales` is the option
that follows the reference implementation: one trained, penalised scale per channel of every identity shortcut, which
the loss itself may drive to 0.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from rmprune.config import Scales, SparsityConfig
from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.graph.calls import is_addition, module_around
from rmprune.graph.copied import copied
from rmprune.training.optimizer import SHORTCUT_SCALE
from rmprune.training.state import TrainState

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MIXING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # after these a channel is no longer the one that went in
_ROUNDING = 2.0**-25  # half a unit in the last place of 1.0 in float32: what a step can lose to rounding


def batch_norm_scales(model: nn.Module, which: Scales = "all") -> dict[str, nn.Parameter]:
    """The batch-norm scales that the penalty applies to, by parameter name; shortcut scales are not among them.

    "all": every batch-norm scale of the network, as in network slimming. After RM any channel can go, so any scale is
        worth a pull; this is the default.
    "inner": only scales whose channels no addition reads on their way to the next convolution or linear layer: the
        first batch norms of a block. These are the channels that can go while residuals still couple the others, so it
        is the set for slimming without RM. Needs a model that torch.fx can trace (`UnsupportedModel` otherwise); a scale
        that its trace does not show is not among them.

    A scale of 0 does not silence its channel: that emits the constant act(shift), which pruning folds onwards. Raises ConfigError for
    another `which`.
    """
    found = {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, _BATCH_NORMS) and module.affine
    }
    if which == "all":
        return found
    if which != "inner":
        raise ConfigError(f"scales is {which!r}; use 'all' or 'inner'")
    inner = _away_from_additions(_trace(model))
    return {name: scale for name, scale in found.items() if name in inner}


def shortcut_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scales [C, 1, 1, 1] that `add_shortcut_scales` put on shortcuts, by parameter name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-2:] == [SHORTCUT_SCALE, "weight"]
    }


def soft_threshold_(scales: Mapping[str, Tensor], pull: float) -> None:
    """Move every scale towards 0 by `pull`, in place, and stop at exactly 0: sign(g) * max(|g| - pull, 0)."""
    with torch.no_grad():
        for scale in scales.values():
            scale.copy_(nn.functional.softshrink(scale, pull))


class ProximalL1:
    """The training hook that applies the penalty to batch-norm scales and, where there are any, shortcut scales.

    It keeps nothing that a checkpoint would need, and follows a model that another hook replaces.
    """

    def __init__(self, config: SparsityConfig) -> None:
        self.config = config
        self._model: nn.Module | None = None
        self._scales: dict[str, nn.Parameter] = {}

    def __call__(self, state: TrainState) -> None:
        if self.config.strength == 0:
            return
        if state.model is not self._model:
            self._model = state.model
            self._scales = batch_norm_scales(state.model, self.config.scales) | shortcut_scales(state.model)
            if not self._scales:
                raise UnsupportedModel(
                    "the model has no batch-norm scales for the sparsity to act on; set strength to 0"
                )
        pull = self.config.strength * state.learning_rate / state.learning_rate_sum
        soft_threshold_(self._scales, pull + _ROUNDING)


def add_shortcut_scales(model: nn.Module, example_inputs: Tensor) -> nn.Module:
    """A new model in which every identity shortcut of an addition passes through a trained scale per channel.

    The scale is a depthwise 1x1 convolution without bias, initialised to 1: a stock layer, so the function is unchanged
    at first, RM sees a linear shortcut and Torch-Pruning a depthwise layer. An identity shortcut is an operand of an
    addition that the other operand was computed from. `example_inputs` [N, C, H, W] give the shapes.
    Raises `UnsupportedModel` when torch.fx cannot trace the model or there is no identity shortcut.
    """
    traced = _trace(copied(model))
    was_training = model.training
    traced.eval()  # so that the shapes' run leaves the batch-norm statistics alone
    with torch.no_grad():
        ShapeProp(traced).propagate(example_inputs)
    shortcuts = [(node, source) for node in traced.graph.nodes if (source := _identity_shortcut(node))]
    if not shortcuts:
        raise UnsupportedModel("the model has no identity shortcut to put a scale on; leave shortcut_scales off")
    for addition, source in shortcuts:
        shape = source.meta["tensor_meta"].shape
        if len(shape) != 4:
            raise UnsupportedModel(f"{addition.name}: its shortcut has shape {tuple(shape)}, not [N, C, H, W]")
        name = _free_name(traced, _block_name(addition))
        traced.add_submodule(name, _unit_scale(shape[1], like=next(model.parameters())))
        with traced.graph.inserting_before(addition):
            scaled = traced.graph.call_module(name, (source,))
        addition.replace_input_with(source, scaled)
    traced.graph.lint()
    traced.recompile()
    for node in traced.graph.nodes:
        node.meta.clear()
    return traced.train(was_training)


def _unit_scale(channels: int, like: Tensor) -> nn.Conv2d:
    scale = nn.Conv2d(channels, channels, 1, groups=channels, bias=False, device=like.device, dtype=like.dtype)
    nn.init.ones_(scale.weight)
    return scale


class _Tracer(fx.Tracer):
    """torch.fx's own, which leaves dropout alive, but with others' batch norms, convolutions and linear layers whole: what theirs do may
    depend on `self.training` and on sizes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_BATCH_NORMS, *_MIXING)) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.GraphModule:
    try:
        return fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise UnsupportedModel(
            f"torch.fx cannot trace the model ({error}); use scales='all' and no shortcut scales"
        ) from error


def _identity_shortcut(node: fx.Node) -> fx.Node | None:
    """The operand of an addition that the other one is computed from."""
    operands = node.all_input_nodes
    if not is_addition(node) or len(operands) != 2:
        return None
    for source, branch in (operands, operands[::-1]):
        if _depends_on(branch, source):
            return source
    return None


def _depends_on(node: fx.Node, ancestor: fx.Node) -> bool:
    waiting, seen = [node], {node}
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent is ancestor:
                return True
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return False


def _block_name(addition: fx.Node) -> str:
    """The module that the addition stands in; where the trace does not tell, a name of the addition's own."""
    block, _ = module_around(addition)
    return f"{block or f'{addition.name}_block'}.{SHORTCUT_SCALE}"


def _free_name(traced: fx.GraphModule, name: str) -> str:
    taken, number, free = {path for path, _ in traced.named_modules()}, 1, name
    block = name.removesuffix(f".{SHORTCUT_SCALE}")
    while free in taken:
        number += 1
        free = f"{block}.shortcut{number}.{SHORTCUT_SCALE}"
    return free


def _mixes(name: str, layer: nn.Module) -> bool:
    """Whether a layer's outputs are no longer its inputs, channel by channel."""
    depthwise = getattr(layer, "groups", 1) == getattr(layer, "in_channels", 0) > 1
    return isinstance(layer, _MIXING) and not depthwise and name.rpartition(".")[2] != SHORTCUT_SCALE


def _away_from_additions(traced: fx.GraphModule) -> set[str]:
    """Names of weights (of layers that are called, or given to a function) whose every path to an addition meets a convolution or linear
    layer."""
    modules = dict(traced.named_modules())
    added: set[fx.Node] = set()  # additions, and what they read without such a layer between
    for node in reversed(traced.graph.nodes):
        mixed = node.op == "call_module" and _mixes(str(node.target), modules[node.target])
        if is_addition(node) or (not mixed and not added.isdisjoint(node.users)):
            added.add(node)
    met = {node: f"{node.target}.weight" for node in traced.graph.nodes if node.op == "call_module"}
    met |= {node: str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    return set(met.values()) - {name for node, name in met.items() if node in added}
