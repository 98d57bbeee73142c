"""How accurate a pruned network would be, fast: a policy's widths in, accuracy on images held in memory out.

What makes it fast, compared with copying the model, masking it and evaluating it:
1. It computes on physically smaller tensors: a policy is a set of indices, and weights are sliced by them.
2. Nothing is built: no module, no trace. The traced graph is one list of operations that runs on any slices.
3. Batch norms are folded into the sliced weights, so that a layer is one convolution with a bias.
4. bfloat16 where the processor computes in it, and channels-last; linear layers in the model's own precision.
5. What no policy changes (everything before the first layer that reads pruned channels, e.g. stem and first depthwise
   layer) is computed once; a policy takes channels of it.
6. Images are in memory, normalised once, and run in chunks that fit the caches.

Statistics are measured anew for each policy on calibration images (training images): see `calibration`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmprune.amc.space import Space, Widths
from rmprune.pruning.calibration import Calibrator, Cut, Fitting, affine, convolve, fold_scale
from rmprune.pruning.groups import Scores
from rmprune.pruning.program import Op, Program, read_program
from rmprune.pruning.refit import write_layers
from rmprune.pruning.surgery import shrink

Maps = dict[str, Tensor]
FoldedLayers = Mapping[str, tuple[Tensor | None, Tensor, Tensor]]


@dataclass(frozen=True)
class ScoringSettings(Fitting):
    """How to fit and score. chunk: images at a time; cache_bytes: most memory for what no policy changes."""

    reconstruct: bool = False
    samples: int = 4096
    own_statistics: bool = False
    chunk: int = 128
    cache_bytes: int = 1 << 30


def importance_order(scores: Scores) -> dict[str, Tensor]:
    """Group -> its units, the most important first; equal ones in their own order."""
    return {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}


class Scorer:
    """Accuracy of policies of one trained network. Deterministic; the model is copied and left alone.

    model: the unpruned network, on the device of the images; order: group -> its units, most important first; calibration:
    training images; images, labels: the validation subset. Raises UnsupportedModel where the graph cannot be read.
    """

    def __init__(
        self, model: nn.Module, space: Space, order: Mapping[str, Tensor], calibration: Tensor, images: Tensor,
        labels: Tensor, settings: ScoringSettings | None = None,
    ) -> None:  # fmt: skip
        self.settings = settings or ScoringSettings()
        self.space, self.order, self.labels = space, dict(order), labels
        self.calibrator = Calibrator(model, space.structure, self.settings)
        self.model = self.calibrator.model
        program = read_program(model, space.structure, calibration)
        with torch.inference_mode():
            x = self._prepare(calibration)
            self.calibrator.measure_reference(program.unshared(), x)
            example = self._static_values(program, x[:1])
            each = sum(value.numel() * value.element_size() for value in example.values())
            fits = each * (len(images) + len(x)) <= self.settings.cache_bytes
            self.program = program if fits else program.unshared()
            self.calibration = self._static_values(self.program, x)
            chunks = images.split(self.settings.chunk)
            self.inputs = [self._static_values(self.program, self._prepare(chunk)) for chunk in chunks]

    def accuracy(self, widths: Widths) -> float:
        """Share of the validation images that the pruned, recalibrated network classifies correctly."""
        return float((self.outputs(widths).argmax(1) == self.labels).double().mean())

    def outputs(self, widths: Widths) -> Tensor:
        """The pruned, recalibrated network's outputs [images, classes] on the validation images."""
        with torch.inference_mode():
            cut = Cut.of(self.model, self.space.structure, self.space.keep(widths, self.order))
            fitted = self.calibrator.fit(self.program, self._taken(self.calibration, cut), cut)
            folded = {name: fold_scale(fit, self.settings.dtype) for name, fit in fitted.items()}
            return torch.cat([self._predict(values, folded, cut) for values in self.inputs])

    def build(self, widths: Widths) -> nn.Module:
        """The network of a policy as a smaller module in eval mode, with the weights and statistics that were scored."""
        keep = self.space.keep(widths, self.order)
        with torch.inference_mode():
            cut = Cut.of(self.model, self.space.structure, keep)
            fitted = self.calibrator.fit(self.program, self._taken(self.calibration, cut), cut)
        smaller = shrink(self.model, keep, self.space.structure)[0]
        return write_layers(smaller, self.program, fitted, self.calibrator, cut).requires_grad_(True)

    def _prepare(self, x: Tensor) -> Tensor:
        return x.to(self.settings.dtype, memory_format=torch.channels_last)

    def _static_values(self, program: Program, x: Tensor) -> Maps:
        """The values on the frontier for these images, with all channels, laid out so that channels are quick to take."""
        cut, fitted = Cut({}, {}), self.calibrator.reference
        folded = {name: fold_scale(fit, self.settings.dtype) for name, fit in fitted.items()}
        values: Maps = {program.ops[0].name: x}
        for op in program.ops[1:]:
            if op.static:
                values[op.name] = self._apply(program, op, values, folded, cut)
        return {op.name: values[op.name].contiguous(memory_format=torch.channels_last) for op in program.frontier}

    def _taken(self, values: Maps, cut: Cut) -> Maps:
        """The frontier's values with the channels that a policy keeps; always a copy, never the cache itself."""
        found: Maps = {}
        for op in self.program.frontier:
            value, index = values[op.name], cut.outputs(op.origin)
            if index is not None:
                value = value.permute(0, 2, 3, 1).index_select(3, index.to(value.device)).permute(0, 3, 1, 2)
            found[op.name] = value.clone() if index is None else value
        return found

    def _predict(self, cached: Maps, folded: FoldedLayers, cut: Cut) -> Tensor:
        values = self._taken(cached, cut)
        for op in self.program.ops:
            if not op.static:
                values[op.name] = self._apply(self.program, op, values, folded, cut)
                for name in op.dead:
                    del values[name]
        return values[self.program.result]

    def _apply(self, program: Program, op: Op, values: Maps, folded: FoldedLayers, cut: Cut) -> Tensor:
        if op.kind == "layer":
            weight, _, bias = folded[op.name]
            assert weight is not None
            return convolve(self.calibrator.layers[op.layer], values[op.inputs[0]], weight, bias)
        if op.kind == "norm":
            _, scale, shift = folded[op.name]
            return affine(values[op.inputs[0]], scale, shift, own=False)
        return self.calibrator.apply_plain(program, op, values, cut)
