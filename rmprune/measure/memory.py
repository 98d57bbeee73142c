"""Peak memory of this process while something runs (Linux)."""

from pathlib import Path
from types import TracebackType

from rmprune.errors import ConfigError

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


def _read(name: str) -> int:
    """A field of /proc/self/status, in KiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
