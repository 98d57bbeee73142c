"""The shape of every tensor in a normalised graph: by formula where plain, else by a run on the meta device."""

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from rmprune.errors import UnsupportedModel
from rmprune.graph.activations import rule_of
from rmprune.graph.convolution import plain, positions
from rmprune.graph.copied import copied
from rmprune.graph.double import InDouble, each_argument
from rmprune.graph.functional import NORMS
from rmprune.graph.network import Network, in_words
from rmprune.graph.run import Values, evaluating, hooked, node_value, on_copies, run
from rmprune.graph.tensors import all_tensors, device_of

M = TypeVar("M", bound=nn.Module)
_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""{dimensions of a batch: the layers that take it}."""


def propagate_shapes(network: Network, example_inputs: tuple[Tensor, ...]) -> None:
    """Runs the graph on the meta device and notes the shape of every tensor."""
    for node, value in run(network.graph, blank_inputs(example_inputs, torch.float64), partial(_value, network)):
        if isinstance(value, Tensor):
            node.meta["shape"], node.meta["floating"] = tuple(value.shape), value.is_floating_point()
        else:
            node.meta.pop("shape", None)


def record_shapes(model: nn.Module, example_inputs: Tensor, kinds: Any) -> dict[str, tuple[torch.Size, torch.Size]]:
    """{layer: (input shape, output shape)} of the layers of these kinds that run, for one example; its first use where there are two."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def record(name: str, _: nn.Module, inputs: tuple[Tensor, ...], by_name: dict[str, Tensor], output: Tensor) -> None:
        shapes.setdefault(name, (next(iter((*inputs, *by_name.values()))).shape, output.shape))

    found = ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))
    hooks = (module.register_forward_hook(partial(record, name), with_kwargs=True) for name, module in found)
    with hooked(hooks), evaluating(model), torch.no_grad():
        on_copies(model, example_inputs[:1].to(device_of(model)))
    return shapes


def blank_inputs(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Inputs of the same shapes without values, those of floating point in `dtype`."""
    return tuple(_empty(x.shape, dtype if x.is_floating_point() else x.dtype) for x in inputs)


def _empty(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def on_meta(module: M) -> M:
    """A copy whose parameters and buffers have no values."""
    return copied(module, {id(tensor): blank(tensor) for tensor in all_tensors(module)})


def to_run(module: M, dtype: torch.dtype | None = None) -> M:
    """The same layer to run once on the meta device: tensors without values (in `dtype`), all else shared, a tenth of a copy's time."""
    twin, held = object.__new__(type(module)), (*module._parameters.values(), *module._buffers.values())
    blanks = {id(tensor): blank(tensor, dtype) for tensor in held if tensor is not None}
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            value = {key: blanks.get(id(tensor)) for key, tensor in value.items()}
        elif name == "_modules":
            value = {key: part if part is None else to_run(part, dtype) for key, part in value.items()}
        elif type(value) is list:  # in which a GRU holds its weights once more
            value = [blanks.get(id(part), part) for part in value]
        vars(twin)[name] = value
    return twin


def blank(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same without values; in `dtype` where it is of floating point."""
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if tensor.layout == torch.strided and tensor.is_contiguous():  # at a third of the time
        empty = _empty(tensor.shape, dtype)
    else:
        empty = torch.empty_like(tensor, device="meta", dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _value(network: Network, node: fx.Node, values: Values) -> Any:
    try:
        known = _known_shape(network, node, values)
        if known is not None:
            return _empty(known, values[node.all_input_nodes[0]].dtype)
        with InDouble(), WithoutValues():
            return node_value(node, values.__getitem__, lambda n: _own(network.own(n)))
    except UnsupportedModel:
        raise
    except Exception as error:
        shapes = [tuple(values[n].shape) for n in node.all_input_nodes if isinstance(values[n], Tensor)]
        what = node.target if isinstance(node.target, str) else in_words(network, node)
        raise UnsupportedModel(f"{what}: fails on inputs of shape {shapes}: {error}") from error


class Plainly(TorchFunctionMode):
    """On the meta device, batch norms, activations and (unless something else looks at them) `convolutions` at a tenth of the cost of
    torch's rules."""

    def __init__(self, convolutions: bool = True) -> None:
        super().__init__()
        self.quick = _QUICK if convolutions else _QUICK - {F.conv2d}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _kept(func, args, kwargs or {}) if func in self.quick else None
        return func(*args, **(kwargs or {})) if found is None else found


_ACTIVATIONS = frozenset((F.relu, F.hardtanh, F.hardswish, F.hardsigmoid, F.leaky_relu))
_QUICK = _ACTIVATIONS | {F.batch_norm, F.conv2d}


def _kept(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """What such a call gives; None where it is another one, or may go wrong."""
    if func not in _QUICK or not args or not _is_plain(args[0]):
        return None
    x = args[0]
    if func is F.conv2d:
        return map_of(*args) if len(args) == 7 and not kwargs else None
    if func is F.batch_norm and len(args) == 3 and not kwargs.get("training"):
        held = [*args[1:], *(t for t in (kwargs.get("weight"), kwargs.get("bias")) if t is not None)]
        fits = all(isinstance(t, Tensor) and t.is_meta and (t.shape, t.dtype) == (x.shape[1:2], x.dtype) for t in held)
        return _empty(x.shape, x.dtype) if fits else None
    if func in _ACTIVATIONS and len(args) == 1 and kwargs.get("min_val", -1) <= kwargs.get("max_val", 1):
        return x if kwargs.get("inplace") else _empty(x.shape, x.dtype)
    return None


def _is_plain(x: Any) -> bool:
    known = isinstance(x, Tensor) and type(x) in (Tensor, nn.Parameter) and x.is_meta
    return known and x.is_floating_point() and x.dtype.itemsize > 1 and x.is_contiguous()


def map_of(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor | None:
    """The map without values (N, C', H', W') that a convolution makes of one (N, C, H, W); None where it may go wrong."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if not all(map(_is_plain, given)) or len({t.dtype for t in given}) > 1 or not x.dim() == weight.dim() == 4:
        return None
    out, channels = weight.shape[:2]
    if (
        isinstance(padding, str)
        or x.shape[1] != channels * groups
        or out % groups
        or (bias is not None and len(bias) != out)
    ):
        return None
    size = positions(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return _empty((len(x), out, *size), x.dtype) if min(size) > 0 else None


class WithoutValues(TorchFunctionMode):
    """What code makes of sizes alone (torch.zeros) has no values either, whatever device it names.

    Not torch.device("meta"): that notes once which functions make tensors, which may be while `fx_tracer` stands in for them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu:
            return args[0]
        if func is Tensor.__deepcopy__:  # its second argument is all that was copied before
            return func(*args, **(kwargs or {}))
        if (found := _kept(func, args, kwargs or {})) is not None:
            return found
        args, kwargs = each_argument(_off_device, args, kwargs or {})
        found = func(*args, **kwargs)
        if not isinstance(found, Tensor) or any(isinstance(x, Tensor) for x in args):
            return found
        return found if any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))) else found.to("meta")


def _off_device(value: Any) -> Any:
    named = isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda"))
    return torch.device("meta") if named else value


def _own(layer: Any) -> Any:
    if isinstance(layer, nn.Module):
        return to_run(layer, torch.float64)
    return blank(layer) if isinstance(layer, Tensor) else layer


def _known_shape(network: Network, node: fx.Node, values: Values) -> tuple[int, ...] | None:
    """The output shape where it is plain, at a thousandth of the cost of a run on the meta device."""
    module = network.layer(node)
    if not isinstance(module, nn.Module) or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    value = values[node.args[0]]
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    if len(shape) < 2:
        return None
    if type(module) is nn.AdaptiveAvgPool2d and len(shape) == 4 and module.output_size in (1, (1, 1)):
        return *shape[:2], 1, 1
    if rule_of(module) is not None and not isinstance(module, nn.PReLU):
        return shape
    if type(module) is NORMS.get(len(shape)):
        return shape if module.num_features == shape[1] else None
    if isinstance(module, nn.Linear):
        known = type(module).forward is nn.Linear.forward and module.in_features == shape[-1]
        return (*shape[:-1], module.out_features) if known else None
    kind = _CONVOLUTIONS.get(len(shape), nn.Conv2d)
    if isinstance(module, kind) and plain(module, kind) and module.in_channels == shape[1]:
        if isinstance(module.padding, str):
            return None
        size = positions(shape[2:], module.kernel_size, module.stride, module.padding, module.dilation)
        return (shape[0], module.out_channels, *size) if min(size) > 0 else None
    return None
