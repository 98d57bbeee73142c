"""Peak memory of a process while something runs (Linux). What activations need on paper is planner.py's business."""

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from rmprune import artifact
from rmprune.errors import ConfigError
from rmprune.measure.backends import check_backend, prepare
from rmprune.measure.candidate import Candidate

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory() as peak: ...`, then `peak.mib`: MiB that the process held at most above what it held at the start.

    The kernel's own count of resident memory, so what libraries take is in it; memory that was freed before and is used
    again is not. Use a fresh process for each measurement. Raises ConfigError where the kernel keeps no such count.
    """

    mib: float = 0.0

    def __enter__(self) -> "PeakMemory":
        try:
            _CLEAR.write_text("5")  # the peak starts again from the present size
        except OSError as error:
            raise ConfigError(f"peak memory needs Linux's {_CLEAR} ({error.strerror or error})") from error
        self._before = _read("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mib = max(0.0, (_read("VmHWM") - self._before) / 1024)


def peak_resident_mib(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    backend: str = "onnxruntime",
    threads: int = 1,
    batch_size: int | None = None,
) -> float:
    """MiB that loading `model` into a float32 backend and running it three times takes at most, in a fresh process, above that process
    with the network in memory and the backend's package imported.

    `example_inputs`: (N, C, H, W), `batch_size` defaults to N. Raises ConfigError where the backend or the kernel's count is missing,
    UnsupportedModel where the network is no artifact.
    """
    check_backend(backend, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        network = Path(folder) / "network"
        artifact.save(model, network)
        shape = ",".join(map(str, example_inputs.shape[1:]))
        words = (str(network), shape, backend, str(threads), str(batch_size or len(example_inputs)))
        done = subprocess.run([sys.executable, "-m", __name__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"peak memory on {backend!r} cannot be measured: {done.stderr.strip().splitlines()[-1][:200]}"
        )
    return float(done.stdout.strip().splitlines()[-1])


def _measure_here(network: str, shape: str, backend: str, threads: str, batch_size: str) -> float:
    torch.set_num_threads(int(threads))
    example = torch.randn(1, *map(int, shape.split(",")), generator=torch.Generator().manual_seed(0))
    setting = (backend, "cpu", int(threads), int(batch_size))
    with torch.inference_mode():
        small = Candidate("warm", nn.Conv2d(example.shape[1], 1, 1), example[..., :4, :4])
        prepare(small, backend, "cpu", int(threads), 1)()  # the runtime itself is in memory from here on
        candidate = Candidate("network", artifact.load(network), example)
        prepare(candidate, *setting)  # its form is made; what that took is given back
        ctypes.CDLL(None).malloc_trim(0)
        with PeakMemory() as peak:
            prepared = prepare(candidate, *setting)
            for _ in range(3):
                prepared()
    return peak.mib


def _read(name: str) -> int:
    """A field of /proc/self/status, in KiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


if __name__ == "__main__":
    print(_measure_here(*sys.argv[1:]))
