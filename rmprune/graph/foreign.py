"""Networks as people bring them: wrappers taken off, weights that are computed made numbers, what cannot be read refused."""

import importlib
import logging
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from rmprune.errors import UnsupportedModel
from rmprune.graph.copied import copied
from rmprune.graph.network import named
from rmprune.graph.tensors import all_tensors, named_tensors, own_tensors

M = TypeVar("M", bound=nn.Module)
logger = logging.getLogger("rmprune")
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "AveragedModel": "module",
}
_WRAPPERS |= {"ModelEmaV2": "module", "ModelEmaV3": "module"}
_COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_QUANTISED = ("torch.ao.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic", "torchao.")
# torch.nn.utils.weight_norm and spectral_norm as they were before parametrizations.
_HOOKED = ("WeightNorm", "SpectralNorm")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# timm's, which standardise their weights, each filter for itself, whenever they run.
_STANDARDISED = ("StdConv2d", "ScaledStdConv2d", "StdConv2dSame", "ScaledStdConv2dSame")


def plain_module(model: nn.Module) -> nn.Module:
    """The network itself: outside and inside of no DataParallel, DistributedDataParallel, torch.compile or average of weights (EMA), and
    with weights that are numbers. The argument where there is nothing to do, else a copy, which the log says; the argument is left alone.

    Raises UnsupportedModel for what is no network of modules and tensors that can be read; it says what, where, and what to do.
    """
    while isinstance(model, nn.Module) and (inner := _inside(model)) is not None:
        model = inner
    _refuse_foreign(model)
    computed = [name for name, module in model.named_modules() if _computed(module)]
    wrapped = [name for name, module in model.named_modules() if _inside(module) is not None]
    if not computed and not wrapped:
        return model
    model = copied(model)
    for name in reversed(wrapped):
        inner = model.get_submodule(name)
        while (deeper := _inside(inner)) is not None:
            inner = deeper
        model.set_submodule(name, inner)
    for module in model.modules():
        make_permanent(module)
    if computed:
        logger.warning(
            "weights that are computed (weight norm, weight standardisation, spectral norm, masks, parametrizations) are made permanent "
            "in the copy: %s",
            ", ".join(name or type(model).__name__ for name in computed),
        )
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper of torch's or timm's wraps."""
    name = _WRAPPERS.get(type(module).__name__)
    if name is None or not type(module).__module__.startswith(("torch.", "timm.utils.")):
        return None
    return getattr(module, name)


def _computed(module: nn.Module) -> bool:
    hooked = any(is_of_weights(hook) for hook in module._forward_pre_hooks.values())
    return parametrize.is_parametrized(module) or hooked or named(module, _STANDARDISED)


def is_of_weights(hook: Any) -> bool:
    """Whether a forward pre-hook is one of torch's that computes a weight."""
    return type(hook).__name__ in _HOOKED or isinstance(hook, BasePruningMethod)


def make_permanent(module: nn.Module) -> None:
    """Weights of this module that are computed from others become numbers, as they are in eval mode. In place."""
    values: dict[str, Tensor] = {}
    was, module.training = module.training, False
    with torch.no_grad():
        for key, hook in list(module._forward_pre_hooks.items()):
            if is_of_weights(hook):
                hook(module, ())
                name = str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight"))
                values[name] = getattr(module, name).detach().clone()
                del module._forward_pre_hooks[key]
        if parametrize.is_parametrized(module):
            values |= {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
            # Not remove_parametrizations: the copy shares its made-up class with the original, which that would damage.
            module.__class__ = type(module).__bases__[0]
            del module._modules["parametrizations"]
        if named(module, _STANDARDISED):
            values["weight"] = _plain_convolution(module)
    module.training = was
    for name, value in values.items():
        for other in (name, *(f"{name}_{end}" for end in ("g", "v", "orig", "mask", "u", "sigma"))):
            for held in (vars(module), module._parameters, module._buffers):
                held.pop(other, None)
        module.register_parameter(name, nn.Parameter(value))


def _plain_convolution(module: Any) -> Tensor:
    """The standardised weight of one of timm's convolutions, which becomes a stock one, in place."""
    gain = getattr(module, "gain", None)
    by = None if gain is None else (gain * module.scale).view(-1)
    flat = module.weight.reshape(1, module.out_channels, -1)
    weight = F.batch_norm(flat, None, None, weight=by, training=True, momentum=0.0, eps=module.eps)
    for name in ("gain", "scale", "eps", "gain_init"):
        module._parameters.pop(name, None)
        vars(module).pop(name, None)
    same = vars(module).pop("same_pad", False)
    module.__class__ = importlib.import_module("timm.layers").Conv2dSame if same else nn.Conv2d
    return weight.reshape_as(module.weight).detach().clone()


def reference_copy(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode on the CPU, without the user's hooks. The argument is left alone."""
    twin = copied(model, {id(tensor): _in_double(tensor) for tensor in all_tensors(model)})
    if any(type(module)._apply is not nn.Module._apply for module in model.modules()):  # who may hold more
        twin = twin.cpu().double()
    return _evaluated(twin)


def _in_double(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    twin = tensor.detach().to("cpu", dtype, copy=True)
    return nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without the user's hooks. The argument is left alone."""
    return _evaluated(copied(model))


def _evaluated(twin: nn.Module) -> nn.Module:
    return freeze(unbound(twin).eval()).requires_grad_(False)


def unbound(model: M) -> M:
    """The network itself; the torch.fx graphs in it name it no more: in such a circle it would fill the memory until Python looks."""
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            module.graph.owning_module = None
    return model


def freeze(twin: nn.Module) -> nn.Module:
    """Weights that are computed from others (weight norm, spectral norm, masks, parametrizations) become numbers; hooks go."""
    for module in list(twin.modules()):
        make_permanent(module)
    for module in twin.modules():
        for name in HOOKS:
            getattr(module, name).clear()
    return twin


def has_hooks(model: nn.Module) -> bool:
    """Whether something listens to, or changes, what a module reads or returns."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(not is_of_weights(hook) for hook in hooks)


def _refuse_foreign(model: Any) -> None:
    kind = type(model).__name__
    if kind == "ExportedProgram":
        raise UnsupportedModel(
            "an ExportedProgram holds operators and no layers: pass the nn.Module that it was exported from"
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(
            f"the network must be a torch.nn.Module, got {kind}: build it and load its weights first"
        )
    for path, module in model.named_modules():
        where = f"{path} ({type(module).__name__})" if path else type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(
                f"{where}: TorchScript cannot be read as layers: pass the nn.Module that it was made from"
            )
        if type(module).__module__.startswith(_QUANTISED):
            raise UnsupportedModel(
                f"{where}: quantised, or prepared for it, so that its weights are not those it computes with: pass the network in "
                "floating point, and quantise the result"
            )
        if "FullyShardedDataParallel" in [c.__name__ for c in type(module).__mro__]:
            raise UnsupportedModel(
                f"{where}: its weights are spread over processes: pass a copy with the whole state dict loaded"
            )
        if isinstance(module, fx.GraphModule) and any(
            isinstance(n.target, torch._ops.OpOverload) for n in module.graph.nodes
        ):
            raise UnsupportedModel(
                f"{where}: a graph of exported operators holds no layers: pass the nn.Module it was exported from"
            )
        stock = type(module).__module__.startswith("torch.nn.")
        own = vars(module).get("forward")
        if own is not None and _inside(module) is None and (stock or getattr(own, "__self__", None) is not module):
            raise UnsupportedModel(f"{where}: its forward was replaced; make that a module of its own")
        for name, tensor in own_tensors(module):
            _refuse_tensor(f"{path}.{name}" if path else name, tensor)


def _refuse_tensor(where: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise UnsupportedModel(f"{where}: a lazy layer has no weights yet: run one batch through the network first")
    if tensor.is_floating_point() and tensor.dtype not in _COMPUTED_IN:
        raise UnsupportedModel(
            f"{where}: {str(tensor.dtype).removeprefix('torch.')} keeps numbers and computes with none: pass the network in floating point"
        )
    kinds = [c for c in type(tensor).__mro__ if issubclass(c, Tensor) and c not in (Tensor, nn.Parameter, nn.Buffer)]
    if any(name in vars(c) for c in kinds for name in ("__torch_function__", "__torch_dispatch__")):
        raise UnsupportedModel(
            f"{where}: a {type(tensor).__name__} is no plain tensor (it computes in its own way): pass the network with plain weights"
        )


def refuse_weights(model: nn.Module) -> None:
    """Raises UnsupportedModel for a network whose weights have no values (the meta device), or complex ones."""
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta:
            raise UnsupportedModel(
                f"{name}: on the meta device it has no values: load the network's weights first (to_empty, load_state_dict)"
            )
        if tensor.is_complex() and isinstance(tensor, nn.Parameter):
            raise UnsupportedModel(
                f"{name} is complex: only real weights are scored, fitted and saved; hold its two parts as real ones"
            )
