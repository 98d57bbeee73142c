"""A network made ready for measuring, and what a backend makes of it. No runtimes here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rmprune.artifact.onnx import onnx_bytes
from rmprune.errors import ConfigError
from rmprune.graph.fold import fold_batch_norms

Form = TypeVar("Form")
Run = Callable[[], object]


class Setting(NamedTuple):
    """How a runtime is set: `device` cpu, cuda or cuda:N; its threads; images in a batch."""

    device: str
    threads: int
    batch_size: int


@dataclass(frozen=True)
class Prepared:
    """A network in a runtime. `run` (or a call) runs it once over an input that lies where the runtime wants it, and
    copies nothing; `outputs` gives the float32 outputs [batch_size, ...], on the CPU, for that many images [batch_size, C, H, W].
    """

    run: Run
    outputs: Callable[[Tensor], Tensor]
    load_ms: float = 0.0
    """From the form that would be deployed to here: reading, optimising, compiling."""

    def __call__(self) -> object:
        return self.run()


class Candidate:
    """A network in eval mode and float32 with its batch norms folded. What is made of it on the way to a runtime is made
    once (`form`).

    `calibration`: training images [N, C, H, W], which int8 needs to choose its ranges by.
    """

    def __init__(self, name: str, model: nn.Module, example_inputs: Tensor, calibration: Tensor | None = None) -> None:
        self.name = name
        self.example_inputs = example_inputs.detach().float().cpu()[:1]
        self.folded = fold_batch_norms(model).float().cpu().to(memory_format=torch.contiguous_format)
        self._calibration = calibration
        self._forms: dict[Callable[[Candidate], Any], Any] = {}

    def form(self, make: "Callable[[Candidate], Form]") -> Form:
        """`make(self)`, made once."""
        if make not in self._forms:
            self._forms[make] = make(self)
        found: Form = self._forms[make]
        return found

    def inputs(self, batch_size: int) -> Tensor:
        """The first example, `batch_size` times: (batch_size, C, H, W), float32."""
        return self.example_inputs.repeat(batch_size, *[1] * (self.example_inputs.dim() - 1))

    @property
    def calibration(self) -> Tensor:
        """Raises ConfigError where no training images were given: ranges chosen by noise would say nothing of int8."""
        if self._calibration is None or len(self._calibration) == 0:
            raise ConfigError(
                f"int8 needs training images to choose its ranges by, and none were given for {self.name!r}; give them "
                "as calibration=images, or measure with a backend of another number format"
            )
        return self._calibration.detach().float().cpu()


def folded_form(candidate: Candidate) -> nn.Module:
    """The module itself, as PyTorch runs it."""
    return candidate.folded


def onnx_form(candidate: Candidate) -> bytes:
    """ONNX, float32, batch size free."""
    return onnx_bytes(candidate.folded, candidate.example_inputs)
