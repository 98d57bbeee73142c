"""CUDA graphs: kernels recorded once and launched in one call. Nothing here runs without a GPU; no timing."""

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from rmprune.errors import first_line

logger = logging.getLogger("rmprune")
Result = TypeVar("Result")
WARM_UP = 10  # calls before the recording: three are needed, and a network that is cut every few steps is not worth it


def aside(run: Callable[[], Result], stream: torch.cuda.Stream, times: int = 1) -> Result:
    """What `run` returns, on this stream: allocations and the choice of kernels must be over before it is recorded there."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            result = run()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def recorded(run: Callable[[], Result], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of what `run` does, which is not done yet, and the tensors that each replay fills.

    Other threads may go on (a loader's, which pins memory), and where `run` fails the stream is the current one's again: torch leaves it.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        result = run()
    return graph, result


class Replayed(Generic[Result]):
    """A function of tensors on a GPU, called as it is until it is warm, then recorded and replayed.

    Its arguments have the same shapes and types in every call, and what else it reads or changes stays where it is: another tensor in
    the place of a parameter takes a new `Replayed`. Results are overwritten by the next call. What cannot be recorded goes on as it
    is, and the log says why.
    """

    def __init__(self, function: Callable[..., Result]) -> None:
        self.function, self.stream = function, torch.cuda.Stream()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Result:
        """What the function returns for these."""
        self.calls += 1
        if self.calls == WARM_UP + 1:
            self._record(inputs)
        if self.graph is None:
            return aside(lambda: self.function(*inputs), self.stream)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in inputs]
        try:
            self.graph, self.result = recorded(lambda: self.function(*self.inputs), self.stream)
        except RuntimeError as error:
            logger.warning("not recorded as a CUDA graph: %s", first_line(error))
