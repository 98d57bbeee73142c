"""PyTorch's own ways to execute a network: eager, torch.jit, torch.compile, CUDA graphs. No timing here."""

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from rmprune.errors import ConfigError, first_line
from rmprune.graph.copied import copied
from rmprune.graph.listed import trace
from rmprune.graph.memory_order import in_order, memory_order
from rmprune.measure.candidate import Candidate, Prepared, Setting, folded_form
from rmprune.measure.cuda_graphs import aside, recorded


def _on_device(
    candidate: Candidate, setting: Setting, dtype: torch.dtype, channels_last: bool
) -> tuple[nn.Module, Tensor]:
    """A copy of the network and its input on the device, in channels-last order if wanted and where the network works in it."""
    x = candidate.inputs(setting.batch_size)
    x = x.to(setting.device, dtype if x.is_floating_point() else None)
    model = copied(candidate.form(folded_form)).to(setting.device, dtype)
    if x.dim() == 4 and channels_last:
        order = memory_order(model.to(memory_format=torch.channels_last), x)
        return model.to(memory_format=order), in_order(x, order)
    return model, x


def _prepared(function: Callable[[Tensor], Tensor], x: Tensor) -> Prepared:
    """Of a function from images to outputs; `x` says where and how they lie."""

    def outputs(images: Tensor) -> Tensor:
        order = torch.channels_last if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else None
        images = images.to(x.device, x.dtype).contiguous(memory_format=order or torch.contiguous_format)
        return function(images).float().cpu()

    return Prepared(lambda: function(x), outputs)


def eager(
    candidate: Candidate, setting: Setting, *, dtype: torch.dtype = torch.float32, channels_last: bool = True
) -> Prepared:
    """PyTorch as it is. Threads are torch's own, set by the caller."""
    if len(candidate.all_inputs) == 1:
        return _prepared(*_on_device(candidate, setting, dtype, channels_last))
    model = copied(candidate.form(folded_form)).to(setting.device, dtype)
    batch = [
        x.to(setting.device, dtype if x.is_floating_point() else None) for x in candidate.batch(setting.batch_size)
    ]
    return Prepared(lambda: model(*batch), model)


def torchscript(candidate: Candidate, setting: Setting) -> Prepared:
    """A frozen torch.jit trace, channels-last."""
    model, x = _on_device(candidate, setting, torch.float32, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript announces its own end
        traced = torch.jit.freeze(torch.jit.trace(model, x, check_trace=False))
        for _ in range(3):  # its profiling runs
            traced(x)
    return _prepared(traced, x)


def compiled(candidate: Candidate, setting: Setting, *, dtype: torch.dtype = torch.float32) -> Prepared:
    """torch.compile with its defaults, channels-last; on a CPU it needs a C++ compiler. Raises ConfigError where it fails."""
    model, x = _on_device(candidate, setting, dtype, True)
    # A forward function of its own: candidates that share one would pay for each other's guards and recompilations.
    function = torch.compile(fx.GraphModule(model, trace(model)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(x)
    except Exception as error:  # whatever the compiler chain raises
        raise ConfigError(
            f"backend 'compile': torch.compile fails here ({first_line(error)}); install a C++ "
            "compiler (apt install g++), or measure with another backend"
        ) from error
    return _prepared(function, x)


def cuda_graph(candidate: Candidate, setting: Setting, *, dtype: torch.dtype = torch.float32) -> Prepared:
    """Eager's kernels recorded once and replayed in one call (a CUDA graph), channels-last."""
    model, x = _on_device(candidate, setting, dtype, True)
    return graphed(lambda: model(x), x)


def graphed(run: Callable[[], Tensor], x: Tensor) -> Prepared:
    """What `run` does with the images in `x` as a CUDA graph, which is replayed on the current stream; it returns the outputs."""
    stream = torch.cuda.Stream()
    aside(run, stream, times=3)
    graph, y = recorded(run, stream)

    def outputs(images: Tensor) -> Tensor:
        x.copy_(images)
        graph.replay()
        return y.float().cpu()

    # Held as long as it is replayed: the graph knows the addresses of its weights.
    def replay(reads: object = run) -> None:
        graph.replay()

    return Prepared(replay, outputs)


def current(device: str) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU (cuda, cuda:N) the one that streams, events and synchronisation are of; nothing for the CPU."""
    return torch.cuda.device(device) if device.startswith("cuda:") else contextlib.nullcontext()
