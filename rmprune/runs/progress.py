"""How far a long stage is and how long it will take: a bar on a terminal, else a line in the log now and then."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("rmprune")
FIRST_LINE = 2.0  # seconds after which the log says how long it will take; then at twice that time, and so on


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 12 min, 1.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(label: str, total: int, *, timed: bool = False) -> Iterator[Callable[..., None]]:
    """Yields `advance(count, said)`, to be told of so many more of the `total` done, and what else is to be shown of them.

    `timed`: they are measurements of time, beside which no thread may draw.
    """
    console, started, done, due = Console(stderr=True), time.monotonic(), 0, FIRST_LINE
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden, auto_refresh=not timed) as bar:
        task = bar.add_task(label, total=total)

        def advance(count: int, said: str = "") -> None:
            nonlocal done, due
            done, told = done + count, f"{label}  {said}" if said else label
            bar.update(task, advance=count, description=told, refresh=timed)
            seconds = time.monotonic() - started
            if not console.is_terminal and seconds > due and done < total:
                due = 2 * seconds
                logger.info("%s: %d of %d, %s left", told, done, total, duration(seconds * (total - done) / done))

        yield advance
