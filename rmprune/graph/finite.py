"""Where values stop being finite: in the inputs, in a tensor of the network, or in the first layer that makes them. Changes nothing."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.copied import copied
from rmprune.graph.double import InDouble, in_double
from rmprune.graph.foreign import reference_copy
from rmprune.graph.run import on_copies
from rmprune.graph.tensors import floating_dtype, output_tensors, tensors_in, to_double


def is_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return bool(value.isfinite().all())


def broken_tensor(model: nn.Module, *, buffers: bool = True) -> str | None:
    """The first parameter with a NaN or an infinity, or buffer with a NaN, in words; None where there is none.

    An infinite buffer may be meant: a mask of attention is.
    """
    held = [*model.parameters(), *(model.buffers() if buffers else ())]
    sums = [t.sum().abs() for t in held if t.is_floating_point() or t.is_complex()]
    if not sums or bool(torch.stack([x.to(sums[0].device, torch.float32) for x in sums]).isfinite().all()):
        return None  # what is broken breaks its sum, too; a sum may be infinite without it
    whole = {f"{name} is not finite": tensor.isfinite().all() for name, tensor in model.named_parameters()}
    if buffers:
        whole |= {f"{name} is NaN": ~tensor.isnan().any() for name, tensor in model.named_buffers()}
    there = next((flag.device for flag in whole.values()), None)
    # A GPU is waited for once.
    flags = torch.stack([flag.to(there) for flag in whole.values()]).tolist() if whole else []
    return next((name for name, flag in zip(whole, flags, strict=True) if not flag), None)


@torch.no_grad()
def where_broken(twin: nn.Module, inputs: tuple[Tensor, ...], *, infinite: bool = True) -> str | None:
    """Where values stop being finite, in words: in an input, a tensor of the network, or the first layer whose output is not.

    None where the outputs are, or (without `infinite`) have no NaN. `twin`, a copy, runs once, in the mode it has.
    """
    for place, value in enumerate(inputs):
        if not is_finite(value):
            return f"input {place + 1} is not finite" if len(inputs) > 1 else "the images are not finite"
    written = twin.training  # statistics, by the run that broke: no cause
    if (tensor := broken_tensor(twin, buffers=not written)) is not None:
        return tensor
    found: list[str] = []

    def look(name: str, module: nn.Module, _: Any, output: Any) -> None:
        if not all(map(is_finite, tensors_in(output))):
            found.append(f"layer {name} ({type(module).__name__})" if name else type(module).__name__)

    for name, module in twin.named_modules():
        module.register_forward_hook(partial(look, name))
    outputs = tensors_in(on_copies(twin, *inputs))
    broken = any(not is_finite(x) if infinite else bool(x.isnan().any()) for x in outputs)
    return f"the output of {found[0]} is not finite" if broken else None


def broken_on(model: nn.Module, x: Tensor, *, evaluated: bool = False) -> str | None:
    """`where_broken` of a copy, in its own mode or `evaluated`, that is given images in the dtype of its weights."""
    twin = copied(model)
    return where_broken(twin.eval() if evaluated else twin, (x.to(floating_dtype(model, x.dtype)),))


@torch.no_grad()
def refuse_broken(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raises UnsupportedModel that says where, if NaN begins in the inputs, the network, or what it makes of the first of them; and where
    that holds no tensors that can be looked at."""
    for value in inputs:
        if not is_finite(value):
            raise UnsupportedModel("example_inputs are not finite: give images as the network sees them")
    one = tuple(to_double(x[:1]) for x in inputs)
    twin = reference_copy(model)
    if broken_tensor(twin) is None and not any(bool(x.isnan().any()) for x in output_tensors(in_double(twin, one))):
        return
    with InDouble():
        where = where_broken(reference_copy(model), one, infinite=False)
    if where is not None:
        raise UnsupportedModel(f"{where}: nothing can be proved, scored or fitted with it; load other weights")
