"""A network made ready for measuring, and what a backend makes of it. No runtimes here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rmprune.errors import ConfigError
from rmprune.graph.fold import fold_batch_norms
from rmprune.graph.inputs import as_tuple, only_input
from rmprune.onnx.export import input_names, onnx_bytes
from rmprune.onnx.file import OnnxFile

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

    def __init__(
        self,
        name: str,
        model: nn.Module,
        example_inputs: Tensor | tuple[Tensor, ...],
        calibration: Tensor | None = None,
    ) -> None:
        self.name = name
        self.all_inputs = tuple(
            x.detach().float().cpu()[:1] if x.is_floating_point() else x.cpu()[:1]
            for x in as_tuple(model, example_inputs)
        )
        self.folded = fold_batch_norms(model, self.all_inputs).float().cpu().to(memory_format=torch.contiguous_format)
        self._calibration = calibration
        self._forms: dict[Callable[[Candidate], Any], Any] = {}

    def form(self, make: "Callable[[Candidate], Form]") -> Form:
        """`make(self)`, made once."""
        if make not in self._forms:
            self._forms[make] = make(self)
        found: Form = self._forms[make]
        return found

    @property
    def names(self) -> list[str]:
        """Of its inputs in the ONNX form."""
        return input_names(self.folded, len(self.all_inputs))

    @property
    def results(self) -> list[str]:
        """The names of what is computed on a GPU, of its outputs in the ONNX form."""
        return ["output"]

    def free_sizes(self, batch_size: int) -> dict[str, int]:
        """Sizes that the ONNX form leaves open, by name, as they are for this many images."""
        return {"batch": batch_size}

    @property
    def example_inputs(self) -> Tensor:
        """The first example, (1, C, H, W). Raises UnsupportedModel where the network takes several inputs."""
        return only_input(self.all_inputs, "this backend")

    def inputs(self, batch_size: int) -> Tensor:
        """The first example, `batch_size` times: (batch_size, C, H, W), float32. Raises as `example_inputs` does."""
        return only_input(self.batch(batch_size), "this backend")

    def batch(self, batch_size: int) -> tuple[Tensor, ...]:
        """The first example of every input, `batch_size` times."""
        return tuple(x.repeat(batch_size, *[1] * (x.dim() - 1)) for x in self.all_inputs)

    @property
    def calibration(self) -> Tensor:
        """Raises ConfigError where no training images were given: ranges chosen by noise would say nothing of int8."""
        if self._calibration is None or len(self._calibration) == 0:
            raise ConfigError(
                f"int8 needs training images to choose its ranges by, and none were given for {self.name!r}; give them "
                "as calibration=images, or measure with a backend of another number format"
            )
        return self._calibration.detach().float().cpu()


class FileCandidate(Candidate):
    """An ONNX file as it stands, for runtimes that read one; `all_inputs`: one example of each input, in the file's formats."""

    def __init__(self, name: str, file: OnnxFile, all_inputs: tuple[Tensor, ...]) -> None:
        self.name, self.file, self.all_inputs = name, file, all_inputs
        self._forms: dict[Callable[[Candidate], Any], Any] = {onnx_form: str(file.path.resolve())}
        self._calibration = None

    @property
    def names(self) -> list[str]:
        """Those that the file gives."""
        return [entry.name for entry in self.file.inputs]

    @property
    def results(self) -> list[str]:
        """All that the file gives."""
        return [entry.name for entry in self.file.outputs]

    def free_sizes(self, batch_size: int) -> dict[str, int]:
        """Where the file has names for them."""
        named = {value.name: value.type.tensor_type.shape.dim for value in self.file.proto.graph.input}
        pairs = [
            (dim.dim_param, size)
            for name, x in zip(self.names, self.batch(batch_size), strict=True)
            for dim, size in zip(named[name], x.shape, strict=True)
        ]
        return {name: size for name, size in pairs if name}


def folded_form(candidate: Candidate) -> nn.Module:
    """The module itself, as PyTorch runs it."""
    return candidate.folded


def onnx_form(candidate: Candidate) -> bytes | str:
    """ONNX, float32, batch size free; the path of a candidate that is a file."""
    return onnx_bytes(candidate.folded, candidate.all_inputs)
