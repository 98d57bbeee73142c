"""What a training shows and writes while it runs: progress bar, log.jsonl, and what other tools ask for. It computes nothing."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rmprune.runs.progress import duration
from rmprune.runs.writing import append_line, write_text
from rmprune.training.loggers import open_sinks, write_epoch

_LOGGER = logging.getLogger("rmprune.training")
_REFRESH_SECONDS = 0.2
_FIRST_LINE = 10.0  # seconds after which the log says how far a training is; then at twice that time, and so on


class Journal:
    """Shows progress on a terminal, else logs one line an epoch; keeps `log` as JSON lines, one an epoch."""

    def __init__(
        self, label: str, steps: int, *, done_steps: int, done_epochs: int | None, log: Path | None, progress: bool,
        tools: list[str],
    ) -> None:  # fmt: skip
        self.label, self.log = label, log
        self._sinks = open_sinks(tools, log, label)
        if log is not None and done_epochs is not None:
            _forget_later_epochs(log, label, done_epochs)
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if progress and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(label, total=steps, completed=done_steps, facts="")
            self._bar.start()
        self._shown = 0.0
        self._first, self._steps = done_steps, steps
        self._begun, self._due = time.monotonic(), _FIRST_LINE

    @property
    def wants_step(self) -> bool:
        """Whether the bar, or without one the log, is due for news (facts cost a synchronisation on a GPU)."""
        if self._bar is None:
            return time.monotonic() - self._begun > self._due
        return time.monotonic() - self._shown > _REFRESH_SECONDS

    def step(self, step: int, epoch: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Update the bar, or say in the log how far it is; `epoch` counts from 1, `accuracy` is that of the epoch so far."""
        if self._bar is None:
            seconds = time.monotonic() - self._begun
            self._due = 2 * seconds
            left = duration(seconds * (self._steps - step) / (step - self._first))
            text = "%s: step %d of %d, epoch %d, %.0f images/s, %s left"
            _LOGGER.info(text, self.label, step, self._steps, epoch, images_per_second, left)
        else:
            right = "" if math.isnan(accuracy) else f"  accuracy {accuracy:.2%}"
            facts = f"epoch {epoch}  loss {loss:.3f}{right}  {images_per_second:,.0f} images/s"
            self._bar.update(self._task, completed=step, facts=facts)
            self._shown = time.monotonic()

    def epoch(self, record: dict[str, Any]) -> None:
        """Append a finished epoch to the log. Raises `ArtifactError` where the log cannot be written."""
        record = {"label": self.label, **record}
        if self.log is not None:
            append_line(self.log, json.dumps(record))
        write_epoch(self._sinks, record, record["epoch"])
        if self._bar is None:
            left = (record["epochs"] - record["epoch"]) * record["seconds"]
            _LOGGER.info(
                "%s: epoch %d/%d, loss %.3f, %s, %.0f images/s, %.1f s%s", self.label, record["epoch"],
                record["epochs"], record["train_loss"], _how_good(record), record["images_per_second"],
                record["seconds"], f", {duration(left)} left" if left > 0 else "",
            )  # fmt: skip

    def close(self) -> None:
        """Take the bar away and close the files."""
        if self._bar is not None:
            self._bar.stop()
        for sink in self._sinks:
            sink.close()


def _how_good(record: dict[str, Any]) -> str:
    if record["validation_accuracy"] is None:
        return f"validation {record['validation_loss']:.3f}"
    return f"accuracy {100 * record['train_accuracy']:.2f} %, validation {100 * record['validation_accuracy']:.2f} %"


class SilentJournal(Journal):
    """For the other processes of a distributed training: shows and writes nothing."""

    def __init__(self) -> None:
        self._bar, self._sinks = None, []
        self._begun, self._due = 0.0, math.inf

    def epoch(self, record: dict[str, Any]) -> None:
        """Nothing: another process writes the log."""


def _forget_later_epochs(log: Path, label: str, done_epochs: int) -> None:
    """Drop the lines of epochs that are about to be trained again, and a line that was cut short."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or record.get("label") != label or record.get("epoch", 0) <= done_epochs:
            kept.append(line + "\n")
    write_text(log, "".join(kept))
