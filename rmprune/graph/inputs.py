"""What a call is given: example inputs (one tensor, a tuple of them, or a dict by the names in forward), and whether they fit; names."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rmprune.errors import ConfigError, UnsupportedModel, first_line, out_of_memory
from rmprune.graph.copied import copied
from rmprune.graph.equivalence import refuse_changing_hooks
from rmprune.graph.finite import refuse_broken
from rmprune.graph.foreign import plain_module, refuse_weights
from rmprune.graph.run import on_copies
from rmprune.graph.shapes import Plainly, blank, on_meta
from rmprune.graph.tensors import floating_tensors

_TOO_SMALL = ("too small", "Kernel size can't be greater")  # as torch says it
_READERS = (_ConvNd, nn.Linear)
Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


class Given(tuple[Tensor, ...]):
    """Inputs that a network took (`as_given`): what both are handed on to does not try them again.

    `kept`: what else was found of it with these inputs, for whoever cuts it again with the same weights.
    """

    network: nn.Module
    kept: dict[Any, Any]


def as_given(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, Given]:
    """The network without wrappers (`plain_module`), and its inputs in order (`as_tuple`), tried.

    The one gate of every call that reads a network. Raises UnsupportedModel for a network that cannot be read or has no values, where it
    does not take these inputs, where they or it are not finite, and where a hook changes what it returns.
    """
    model = plain_module(model)
    if isinstance(example_inputs, Given) and example_inputs.network is model:
        return model, example_inputs
    refuse_weights(model)
    inputs = as_tuple(model, example_inputs)
    if any(x.is_meta for x in inputs):
        raise UnsupportedModel("example_inputs on the meta device have no values: give images as the network sees them")
    one, inputs = inputs, _as_many(inputs)
    try:
        trial(model, tuple(torch.cat([x[:1], x[:1]]) for x in inputs), count=2)
    except UnsupportedModel as error:
        trial(model, one)
        raise UnsupportedModel(
            f"the network runs on one example, but not on two, as every check does ({error}): write it for batches of any size"
        ) from error
    try:
        refuse_broken(model, inputs)
    except UnsupportedModel:
        raise
    except (
        Exception
    ) as error:  # of one example something else is wrong than of two, or of float64 than of its own dtype
        trial(model, one)
        if out_of_memory(error):
            raise
        raise UnsupportedModel(
            f"the network does not run in float64 ({type(error).__name__}: {first_line(error)}), in which all that is done to it is "
            "checked: let its code name no dtype, or take it from what is at hand (x.dtype, zeros_like)"
        ) from error
    refuse_changing_hooks(model, inputs)
    given = Given(inputs)
    given.network, given.kept = model, {}
    return model, given


def _as_many(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of one batch size: one example beside many is each one's, as PyTorch broadcasts it."""
    count = max(map(len, inputs))
    for place, x in enumerate(inputs):
        if len(x) not in (1, count):
            raise UnsupportedModel(
                f"input {place + 1} of {len(inputs)} holds {len(x)} examples, another one {count}: give as many of each"
            )
    return tuple(x if len(x) == count else x.expand(count, *x.shape[1:]) for x in inputs)


def as_names(names: Any, setting: str) -> tuple[str, ...]:
    """One name, several, or None for none, as a tuple. Raises ConfigError for anything else in this setting."""
    found = (
        (names,) if isinstance(names, str) else tuple(names or ()) if isinstance(names, Iterable | None) else (names,)
    )
    for name in found:
        if not isinstance(name, str):
            raise ConfigError(f"{setting} is a list of names; got {type(name).__name__} in it")
    return found


def only_input(inputs: tuple[Tensor, ...], call: str) -> Tensor:
    """Raises UnsupportedModel where there are several."""
    if len(inputs) != 1:
        raise UnsupportedModel(
            f"{call} takes networks of one input only, and got {len(inputs)}: make one tensor of them (torch.cat)"
        )
    return inputs[0]


def as_tuple(model: nn.Module, example_inputs: Any) -> tuple[Tensor, ...]:
    """The examples in the order of forward's arguments, as plain tensors; floating point in the dtype of the network, on its device.

    Raises UnsupportedModel for anything but a batch of at least one, in tensors.
    """
    if isinstance(example_inputs, Mapping):
        values = _by_name(model, example_inputs)
    elif isinstance(example_inputs, tuple):
        values = example_inputs
    else:
        values = (example_inputs,)
    if not values:
        raise UnsupportedModel("example_inputs is empty: give one batch, or a tuple with a batch for each input")
    like = next(floating_tensors(model), None)
    found = []
    for place, value in enumerate(values):
        said = f"input {place + 1} of {len(values)}" if len(values) > 1 else "example_inputs"
        if not isinstance(value, Tensor):
            raise UnsupportedModel(
                f"{said} is a {type(value).__name__}: give a tensor (N, ...), a tuple of them where the network takes several, or a "
                "dict by the names of forward's arguments" + _way(value)
            )
        if value.is_nested or value.layout != torch.strided:
            raise UnsupportedModel(
                f"{said} is a sparse or nested tensor: give a dense one, (N, ...), such as x.to_dense()"
            )
        if value.dim() == 0 or value.numel() == 0:
            raise UnsupportedModel(f"{said} has shape {tuple(value.shape)}: give at least one example, (N, ...)")
        value = value.detach().as_subclass(Tensor)
        value = value.clone() if value.is_inference() else value
        if like is not None and not value.is_meta and not like.is_meta:
            value = value.to(like.device, like.dtype if value.is_floating_point() else None)
        found.append(value)
    return tuple(found)


def _way(value: Any) -> str:
    if type(value).__module__ == "numpy":
        return " (torch.from_numpy)"
    return " (torch.stack for a list of images)" if isinstance(value, list) else ""


def _by_name(model: nn.Module, given: Mapping[str, Any]) -> tuple[Any, ...]:
    parameters = inspect.signature(model.forward).parameters
    unknown = [name for name in given if name not in parameters]
    missing = [
        name
        for name, p in parameters.items()
        if name not in given and p.default is p.empty and p.kind.name[:3] != "VAR"
    ]
    if unknown or missing:
        said = [f"there is no {', '.join(map(str, unknown))}"] * bool(unknown) + [
            f"{', '.join(missing)} is missing"
        ] * bool(missing)
        raise UnsupportedModel(
            f"example_inputs by name: forward of {type(model).__name__} takes {', '.join(parameters)}; {' and '.join(said)}"
        )
    order = [name for name in parameters if name in given]
    if order != list(parameters)[: len(order)]:
        raise UnsupportedModel(
            f"example_inputs by name: give those before {order[-1]} as well; forward takes {', '.join(parameters)} in this order"
        )
    return tuple(given[name] for name in order)


@torch.no_grad()
def trial(
    model: nn.Module, inputs: tuple[Tensor, ...], watch: AbstractContextManager[Any] | None = None, count: int = 1
) -> None:
    """Runs the first `count` examples through the network in eval mode, on a copy and on the meta device where that goes, else for real.

    inputs: as `as_tuple` gives them; watch: entered around each run.

    Raises UnsupportedModel where it does not run, with the layer at which it stops and what that takes and got.
    """
    one, plainly, watch = tuple(x[:count] for x in inputs), Plainly(convolutions=watch is None), watch or nullcontext()
    mixed = len({t.dtype for t in floating_tensors(model)}) > 1
    try:
        blanks = [blank(x) for x in one]
        with _watched(on_meta(model).eval(), says=False) as twin, watch, plainly:
            twin(*blanks)
            if not mixed:  # which it does not mind
                return
    except UnsupportedModel:
        raise
    except Exception:  # a tensor made on the fly, an operator without a rule for shapes, or inputs that do not fit
        if any(x.is_meta for x in inputs):
            raise UnsupportedModel(
                "example_inputs on the meta device have no values, and the network does not run without"
            ) from None
    with _watched(copied(model).eval()) as twin, watch:
        on_copies(twin, *one)


@contextmanager
def _watched(twin: nn.Module, says: bool = True) -> Iterator[nn.Module]:
    """Refuses what layers of `twin`, a copy, read; `says`: whatever else goes wrong is said with the innermost layer that was running."""
    running: list[tuple[str, nn.Module, Any]] = []

    def enter(name: str, module: nn.Module, args: Any) -> None:
        running.append((name, module, args))
        _refuse_read(name, module, args)

    def leave() -> None:
        running.pop()

    for name, module in twin.named_modules():
        if says or isinstance(module, _READERS):
            module.register_forward_pre_hook(partial(enter, name))
        if says:
            module.register_forward_hook(lambda *_: leave())
    try:
        yield twin
    except UnsupportedModel:
        raise
    except Exception as error:
        if not says:
            raise
        name, module, args = running[-1] if running else ("", twin, ())
        shapes = ", ".join(_said(x) for x in args if isinstance(x, Tensor)) or "its inputs"
        where = f"layer {name} ({type(module).__name__})" if name else type(module).__name__
        small = "the images are too small for the network: " * any(sign in str(error) for sign in _TOO_SMALL)
        raise UnsupportedModel(
            f"{small}{where} fails on inputs of shape {shapes} ({type(error).__name__}: {' '.join(str(error).split())[:200]}): give "
            "example_inputs of the sizes, number and kind that the network takes"
        ) from error


def _refuse_read(name: str, module: nn.Module, args: Any) -> None:
    """Convolutions take maps without a batch, too, and would read the images of a batch as channels."""
    x = args[0] if args else None
    if not isinstance(module, _READERS) or not isinstance(x, Tensor) or x.is_nested:
        return
    where = f"layer {name} ({type(module).__name__})"
    if module.weight.numel() == 0:
        raise UnsupportedModel(f"{where} has no channels, its weight is {tuple(module.weight.shape)}: leave it out")
    if isinstance(module, _ConvNd) and x.dim() != module.weight.dim():
        raise UnsupportedModel(
            f"{where} fails on inputs of shape {_said(x)}, without a batch: give example_inputs (N, ...), such as image[None], of "
            f"{module.weight.dim()} dimensions here"
        )
    if not x.is_floating_point() and module.weight.is_floating_point():
        raise UnsupportedModel(
            f"{where} fails on inputs of shape {_said(x)}: give example_inputs in "
            f"{str(module.weight.dtype).removeprefix('torch.')}, scaled as in training"
        )
    channels = x.shape[1] if isinstance(module, _ConvNd) else x.shape[-1]
    wanted = module.in_channels if isinstance(module, _ConvNd) else module.in_features
    if channels != wanted:
        raise UnsupportedModel(
            f"{where} fails on inputs of shape {_said(x)}: it takes {wanted} channels; give example_inputs that fit the network"
        )


def _said(x: Tensor) -> str:
    return f"{'of several lengths' if x.is_nested else tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
