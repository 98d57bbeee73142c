"""A pruned network whose layers are fitted to what they put out before: `calibration` says how, this writes it into a module."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rmprune.data.batches import Batches, affordable, network_inputs
from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.pruning.calibration import Calibrator, Cut, Fitted, Fitting
from rmprune.pruning.groups import Keep, Structure
from rmprune.pruning.program import Op, Program, read_program
from rmprune.pruning.surgery import shrink

FITTING_IMAGES = 1024  # training images that layers are fitted on, at most


def refit(model: nn.Module, structure: Structure, keep: Keep, images: Tensor, *, reconstruct: bool = True) -> nn.Module:
    """The network with the units of `keep` alone, each layer fitted to what `model` puts out there on these training images.

    With `reconstruct` weights and intercepts by least squares; without it batch norms get the statistics of what reaches them. All
    maps of `images` are held at a time. Raises UnsupportedModel where the graph of `model` cannot be followed.
    """
    dtype = images.dtype if images.is_floating_point() else torch.float32
    calibrator = Calibrator(model, structure, Fitting(dtype, reconstruct, own_statistics=reconstruct))
    program = read_program(model, structure, images).unshared()
    with torch.inference_mode():
        x = calibrator.ready(images)
        calibrator.measure_reference(program, x)
        cut = Cut.of(calibrator.model, structure, keep)
        fitted = calibrator.fit(program, {program.ops[0].name: x}, cut)
    return write_layers(shrink(model, keep, structure)[0], program, fitted, calibrator, cut)


def refuse_no_images(reconstruct: bool, data: object | None) -> None:
    """Raise ConfigError where layers are to be fitted, but on nothing."""
    if reconstruct and data is None:
        raise ConfigError("reconstruct fits layers on training images; give some as data")


@contextlib.contextmanager
def fitting(way: str = "--no-reconstruct (reconstruct=False) leaves layers as they were cut") -> Iterator[None]:
    """Says in the error of layers that cannot be fitted how to do without."""
    try:
        yield
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}; {way}") from None


def fitting_images(data: Batches, model: nn.Module) -> Tensor:
    """The first images of the batches that layers are fitted on: fewer where they are large, since all their maps are held."""
    images = torch.cat(list(network_inputs(data, model)))
    return images[: affordable(FITTING_IMAGES, images.shape[2:])]


def write_layers(
    smaller: nn.Module, program: Program, fitted: Mapping[str, Fitted], calibrator: Calibrator, cut: Cut
) -> nn.Module:
    """`smaller`, a network of the policy's shape, with the fitted layers written into it."""
    for op in program.ops:
        if op.kind in ("layer", "norm") and not op.shared:
            write_layer(smaller, op, fitted[op.name] if op.name in fitted else calibrator.narrowed(op, cut))
    return smaller


def write_layer(model: nn.Module, op: Op, fit: Fitted) -> None:
    """Put a fitted layer into a network of the policy's shape, in place: its batch norm's statistics, or weight and bias."""
    module = model.get_submodule(op.layer) if op.layer else None
    with torch.no_grad():
        if op.norm:
            norm = model.get_submodule(op.norm)  # of one process, of several, or frozen
            if module is not None and fit.weight is not None:
                module.weight.copy_(fit.weight)  # type: ignore[operator]
            bias = getattr(module, "bias", None)
            # In its own dtype, half precision too.
            norm.get_buffer("running_mean").copy_(fit.mean if bias is None else fit.mean + bias)
            norm.get_buffer("running_var").copy_(fit.variance)
        elif module is not None and fit.weight is not None:
            scaled = fit.weight * fit.scale.view(-1, *[1] * (fit.weight.dim() - 1))
            module.weight.copy_(scaled)  # type: ignore[operator]
            if module.bias is None and bool(fit.shift.any()):
                module.bias = nn.Parameter(module.weight.new_zeros(fit.shift.shape))
            if module.bias is not None:
                module.bias.copy_(fit.shift)  # type: ignore[operator]
