"""One part of `gpu.py` at work: its rows, its time, and what it had to leave out. Measures nothing."""

import contextlib
import csv
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

AGAIN = 5.0  # seconds until a part that did not stop is told again: libraries may swallow what is raised within them


class OutOfTime(BaseException):
    """A part's time is up. No Exception, which the code at work might take for a failure of its own."""


@dataclass
class Part:
    """Rows go to a CSV at once; there is time until `end`, of `time.monotonic`."""

    name: str
    out: Path
    device: str
    end: float
    left_out: list[str]
    columns: list[str] | None = None
    took: dict[str, float] = field(default_factory=dict)
    """Seconds of the last of each kind of thing."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def run(self, measure: Callable[[], None]) -> None:
        """Measure until it is done or the time is up: then it is stopped where it is, and what it had written stays."""

        def stop(*_: object) -> NoReturn:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), AGAIN)
            measure()
        except OutOfTime:
            self.leave_out("the rest", "time was up")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def write(self, **row: Any) -> None:
        """Add a row; the first gives the columns."""
        path = self.out / f"{self.name}.csv"
        row = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        first, self.columns = self.columns is None, self.columns or list(row)
        with path.open("w" if first else "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            if first:
                writer.writeheader()
            writer.writerow(row)

    def leave_out(self, what: str, why: str) -> None:
        self.left_out.append(f"{self.name}, {what}: {why}")
        print(self.left_out[-1], flush=True)

    @contextlib.contextmanager
    def trying(self, what: str, seconds: float = 0.0, kind: str = "") -> Iterator[bool]:
        """Yields whether there is time left for it; what fails, or is not begun, is noted, and the next comes.

        seconds: that it may need, or as many as the last of its `kind` took.
        """
        start = time.monotonic()
        if not (begun := self.left > self.took.get(kind, seconds)):
            self.leave_out(what, "no time was left")
        try:
            yield begun
        except OutOfTime:
            self.leave_out(what, "time was up")
            raise
        except Exception as error:  # nothing that fails may cost what comes after it: time on such a machine is short
            traceback.print_exc()
            self.leave_out(what, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
            if self.device != "cpu":
                torch.cuda.empty_cache()
        if begun and kind:
            self.took[kind] = time.monotonic() - start
