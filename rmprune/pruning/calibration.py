"""What a pruned network's statistics (and, if asked, weights) should be, measured on calibration images layer by layer.

Batch norms get the statistics of what now reaches them. Layers without one (their batch norm was folded) get the mean and
deviation that the unpruned network has there, channel by channel: the same correction, for the folded form. With
`reconstruct` each layer behind pruned channels is first fitted to the unpruned network by least squares; then only the
mean (the intercept) is measured anew, for to restore the deviation would undo the fit.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmprune.graph.copied import copied
from rmprune.graph.tensors import device_of
from rmprune.pruning.groups import Keep, Structure, layer_masks
from rmprune.pruning.layers import SizedLayer, Slices
from rmprune.pruning.positions import Positions, outputs_at, patches_at, sample_positions
from rmprune.pruning.program import Op, Program
from rmprune.pruning.reconstruct import reconstruct, reconstruct_checked
from rmprune.pruning.surgery import take, tensor_slices

logger = logging.getLogger("rmprune")
_LARGEST_GAIN = 10.0  # of the deviation correction where there is no batch norm


@dataclass(frozen=True)
class Fitting:
    """dtype: of all convolutions; reconstruct: fit layers by least squares, each on about `samples` output positions;
    own_statistics: batch norms keep the network's, moved only as far as the means before them move.
    """

    dtype: torch.dtype = torch.float32
    reconstruct: bool = True
    samples: int = 1 << 14
    own_statistics: bool = True


@dataclass(frozen=True)
class Cut:
    """A policy as indices on the model's device: layer -> output channels that stay, parameter -> its slices. Empty: nothing goes."""

    kept: Mapping[str, Tensor]
    slices: Mapping[str, Slices]

    @classmethod
    def of(cls, model: nn.Module, structure: Structure, keep: Keep) -> "Cut":
        """The cut of these masks, as `shrink` would make it."""
        device, masks = device_of(model), layer_masks(structure, keep)
        lost = {layer: mask for (layer, side), mask in masks.items() if side == "out" and not bool(mask.all())}
        kept = {layer: mask.nonzero().flatten().to(device) for layer, mask in lost.items()}
        slices = {
            name: tuple((dim, index.to(device)) for dim, index in own)
            for name, own in tensor_slices(model, structure, keep).items()
        }
        return cls(kept, slices)

    def outputs(self, layer: str) -> Tensor | None:
        """The output channels of a layer that stay; None where all do."""
        return self.kept.get(layer)


@dataclass(frozen=True)
class Fitted:
    """A layer of a policy: its weight, the moments of what it puts out without bias, and the map y * scale + shift behind it.

    All vectors [C_out]; `weight` is None for a batch norm that stands alone.
    """

    weight: Tensor | None
    mean: Tensor
    variance: Tensor
    scale: Tensor
    shift: Tensor


def _changes(op: Op, cut: Cut) -> bool:
    """Whether an operation's own tensors lose something."""
    return any(
        f"{name}.{kind}" in cut.slices for name in (op.layer, op.norm) if name for kind in ("weight", "running_mean")
    )


K = TypeVar("K")


class Calibrator:
    """Fits the layers of any policy of one network. `reference` holds the unpruned network's own values, by operation."""

    def __init__(self, model: nn.Module, structure: Structure, settings: Fitting) -> None:
        self.model = copied(model).eval().requires_grad_(False)
        self.layers = {layer.name: layer for layer in structure.layers}
        self.settings = settings
        held = self.model.named_parameters, self.model.named_buffers
        self.tensors = {name: tensor for each in held for name, tensor in each(remove_duplicate=False)}
        self.reference: dict[str, Fitted] = {}
        self._positions: dict[str, Positions] = {}
        self._wanted: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}

    def ready(self, images: Tensor) -> Tensor:
        """The images where the network is, in the order of memory that its convolutions are fastest in."""
        return images.to(device_of(self.model), memory_format=torch.channels_last if images.dim() == 4 else None)

    def measure_reference(self, program: Program, x: Tensor) -> None:
        """Run the unpruned network on the calibration images and note what the policies are compared with; say what cannot be fitted."""
        if shared := list(
            dict.fromkeys(op.layer or op.norm for op in program.ops if op.shared and op.kind in ("layer", "norm"))
        ):
            logger.warning("fitting layers: used or shared more than once, and left as cut: %s", ", ".join(shared))
        self.reference = self.fit(program, {program.ops[0].name: x}, Cut({}, {}), first=True)

    def fit(self, program: Program, values: dict[str, Tensor], cut: Cut, *, first: bool = False) -> dict[str, Fitted]:
        """Push calibration values (those of the program's frontier) through, each layer fitted to what reaches it."""
        fitted: dict[str, Fitted] = {}
        values = dict(values)
        for op in program.ops:
            if not op.static:
                self._step(program, op, values, cut, first, fitted)
        return fitted

    def outcomes(self, program: Program, x: Tensor, cuts: Mapping[K, Cut], behind: int) -> Iterator[tuple[K, Tensor]]:
        """What the network gives for the calibration images by each cut alone, what it changes and so many layers behind that fitted.

        `program` shares nothing. It is run once up to the first layer that each cut changes, and from there once for each cut.
        """
        waiting = dict(cuts)
        values = {program.ops[0].name: x}
        for at, op in enumerate(program.ops):
            for key in [key for key, cut in waiting.items() if _changes(op, cut)]:
                own, cut = dict(values), waiting.pop(key)
                left = behind
                for later in program.ops[at:]:
                    left = behind if _changes(later, cut) else left - (later.kind == "layer")
                    self._step(program, later, own, cut, False, {}, fitting=left >= 0)
                yield key, own[program.result]
            self._step(program, op, values, Cut({}, {}), True, {})

    def _step(
        self, program: Program, op: Op, values: dict[str, Tensor], cut: Cut, first: bool, fitted: dict[str, Fitted], *,
        fitting: bool = True,
    ) -> None:  # fmt: skip
        if op.kind in ("layer", "norm"):
            fitted[op.name], values[op.name] = self._fit(op, values[op.inputs[0]], cut, first, fitting)
        elif op.kind != "input":
            values[op.name] = self.apply_plain(program, op, values, cut)
        for name in op.dead:
            del values[name]

    def apply_plain(self, program: Program, op: Op, values: Mapping[str, Tensor], cut: Cut) -> Tensor:
        """An operation without statistics: a PReLU with a slope per channel, or whatever stands in the graph."""
        if op.kind == "vector":
            x = values[op.inputs[0]]
            return F.prelu(x, self._taken(f"{op.layer}.weight", cut).to(x.dtype))
        return program.call(op, values)

    def narrowed(self, op: Op, cut: Cut) -> Fitted:
        """The reference of an operation whose inputs no policy changes, with the channels that stay."""
        fit, index = self.reference[op.name], cut.outputs(op.origin)
        if index is None:
            return fit
        weight = None if fit.weight is None else self._taken(f"{op.layer}.weight", cut)
        return Fitted(weight, fit.mean[index], fit.variance[index], fit.scale[index], fit.shift[index])

    def _taken(self, name: str, cut: Cut) -> Tensor:
        return take(self.tensors[name], cut.slices[name]) if name in cut.slices else self.tensors[name]

    def _fit(self, op: Op, x: Tensor, cut: Cut, first: bool, fitting: bool = True) -> tuple[Fitted, Tensor]:
        """The layer (or batch norm) on these inputs, and its outputs."""
        weight, y = None, x
        if op.kind == "layer":
            layer = self.layers[op.layer]
            weight = self._taken(f"{op.layer}.weight", cut)
            if self.settings.reconstruct and not first and fitting and not op.shared:
                weight = self._reconstructed(op, x, weight, cut)
            y = convolve(layer, x, weight if layer.kind == "linear" else weight.to(x.dtype), None)
            if self.settings.reconstruct and first and not op.shared:
                self._note_outputs(op, y)
        if op.norm:
            return self._normalised(op, weight, y, cut)
        mean, variance = _moments(y)
        if first or op.shared:
            bias = f"{op.layer}.bias"
            shift = self._taken(bias, cut).to(mean) if bias in self.tensors else torch.zeros_like(mean)
            scale = torch.ones_like(mean)
        else:
            scale, shift = self._corrected(op, mean, variance, cut)
        return Fitted(weight, mean, variance, scale, shift), affine(y, scale, shift, own=op.kind == "layer")

    def _normalised(self, op: Op, weight: Tensor | None, y: Tensor, cut: Cut) -> tuple[Fitted, Tensor]:
        eps: float = self.model.get_submodule(op.norm).eps  # type: ignore[assignment]
        channels = y.shape[1]
        if f"{op.norm}.weight" in self.tensors:
            gamma, beta = self._taken(f"{op.norm}.weight", cut), self._taken(f"{op.norm}.bias", cut)
        else:
            kind = torch.float64 if y.dtype == torch.float64 else torch.float32
            gamma, beta = y.new_ones(channels, dtype=kind), y.new_zeros(channels, dtype=kind)
        if self.settings.own_statistics or op.shared:
            return self._own_statistics(op, weight, y, gamma, beta, cut)
        out, mean, inverse = torch.native_batch_norm(y, gamma, beta, None, None, True, 0.0, eps)
        variance = (inverse**-2 - eps).clamp(min=0)
        if self.settings.reconstruct and op.kind == "layer" and op.name in self.reference:
            before, index = self.reference[op.name].variance, cut.outputs(op.layer)
            variance = before if index is None else before[index]  # outputs are fitted to have this deviation
            scale = gamma * (variance + eps).rsqrt()
            out = affine(y, scale, beta - mean * scale, own=True)
        else:
            scale = gamma * inverse
        return Fitted(weight, mean, variance, scale, beta - mean * scale), out

    def _own_statistics(
        self, op: Op, weight: Tensor | None, y: Tensor, gamma: Tensor, beta: Tensor, cut: Cut
    ) -> tuple[Fitted, Tensor]:
        """The network's own mean and variance; the mean moves with what reaches the batch norm from a fitted layer."""
        mean, variance = (self._taken(f"{op.norm}.running_{kind}", cut) for kind in ("mean", "var"))
        if op.kind == "layer":
            if f"{op.layer}.bias" in self.tensors:
                mean = mean - self._taken(f"{op.layer}.bias", cut)
            if not op.shared:
                index, now = cut.outputs(op.layer), _moments(y)[0]
                before = self._means.setdefault(op.name, now)
                mean = mean + (now - (before if index is None else before[index]))
        norm = self.model.get_submodule(op.norm)
        scale = gamma * (variance + norm.eps).rsqrt()  # type: ignore[operator]
        shift = beta - mean * scale
        return Fitted(weight, mean, variance, scale, shift), affine(y, scale, shift, own=op.kind == "layer")

    def _corrected(self, op: Op, mean: Tensor, variance: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        """Scale and shift that give a layer without batch norm the moments it has in the unpruned network.

        A linear layer, or one that was fitted by least squares, is only shifted: its intercept.
        """
        before, index = self.reference[op.name], cut.outputs(op.layer)
        wanted_mean, wanted_variance = before.mean + before.shift, before.variance
        if index is not None:
            wanted_mean, wanted_variance = wanted_mean[index], wanted_variance[index]
        if self.settings.reconstruct or self.layers[op.layer].kind == "linear":
            scale = torch.ones_like(mean)
        else:
            scale = (wanted_variance / variance.clamp(min=1e-30)).sqrt().clamp(max=_LARGEST_GAIN)
        return scale, wanted_mean - mean * scale

    def _note_outputs(self, op: Op, y: Tensor) -> None:
        size = (int(y.shape[2]), int(y.shape[3])) if y.dim() == 4 else (1, 1)
        count = -(-self.settings.samples // len(y))
        generator = torch.Generator().manual_seed(len(self._positions))
        at = sample_positions(len(y), size, count, generator).to(y.device)
        self._positions[op.name], self._wanted[op.name] = at, outputs_at(y, at)

    def _reconstructed(self, op: Op, x: Tensor, weight: Tensor, cut: Cut) -> Tensor:
        layer, at, index = self.layers[op.layer], self._positions[op.name], cut.outputs(op.layer)
        wanted = self._wanted[op.name] if index is None else self._wanted[op.name][:, index]
        groups = x.shape[1] if layer.kind == "depthwise" else layer.groups
        fit = reconstruct_checked if self.settings.own_statistics else reconstruct
        return fit(weight, patches_at(x, layer, at), wanted, groups)[0]


def convolve(layer: SizedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's operation with these weights; a linear layer computes in their precision."""
    if layer.kind == "linear":
        return F.linear(x.to(weight.dtype), weight, bias)
    groups = x.shape[1] if layer.kind == "depthwise" else layer.groups  # a cut may have taken some of them
    weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)


def fold_scale(fit: Fitted, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
    """(weight with the scale in it, scale, shift): convolution weights in `dtype`, linear ones in their own precision."""
    if fit.weight is None:
        return None, fit.scale.to(dtype), fit.shift.to(dtype)
    weight = fit.weight * fit.scale.view(-1, *[1] * (fit.weight.dim() - 1))
    kind = fit.weight.dtype if fit.weight.dim() == 2 else dtype
    return weight.to(kind), fit.scale, fit.shift.to(kind)


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (biased) [C] over everything but the channels, at least in float32."""
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    ones, zeros = y.new_ones(y.shape[1], dtype=kind), y.new_zeros(y.shape[1], dtype=kind)
    _, mean, inverse = torch.native_batch_norm(y, ones, zeros, None, None, True, 0.0, 1e-12)
    return mean, (inverse**-2 - 1e-12).clamp(min=0)


def affine(y: Tensor, scale: Tensor, shift: Tensor, *, own: bool) -> Tensor:
    """y * scale + shift, channel by channel; written over y where it is one's own."""
    shape = (1, -1, *[1] * (y.dim() - 2))
    scaled = torch.mul(y, scale.to(y.dtype).view(shape), out=y if own else None)
    return scaled.add_(shift.to(y.dtype).view(shape))
