"""One part of `gpu.py` at work: its rows, its time, what was measured before, and what it had to leave out. Measures nothing."""

import contextlib
import csv
import io
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
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
    card: str = ""
    """What the rows were measured on."""
    before: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Rows of earlier times on any card."""
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

    def has(self, **values: Any) -> bool:
        """Whether a row of these values was measured on this card at an earlier time: it is not measured again."""
        if self.before.empty:
            return False
        asked = {"card": self.card} | values
        found = (self.before[list(asked)].astype(str) == [str(value) for value in asked.values()]).all(axis=1)
        return bool(found.any())

    def write(self, *rows: dict[str, Any]) -> None:
        """Add rows of the same columns to the file, all of them or none: what belongs together is written together."""
        path, text = self.out / f"{self.name}.csv", io.StringIO()
        writer = csv.DictWriter(text, ["card", *rows[0]], restval="")
        if not path.exists():
            writer.writeheader()
        for row in rows:
            rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({"card": self.card} | rounded)
        with path.open("a", newline="") as file:
            file.write(text.getvalue())

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
