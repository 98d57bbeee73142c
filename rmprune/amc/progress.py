"""What a search shows: a bar with best reward, its cost and the time left; a few log lines where there is no terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rmprune.amc.search import SearchResult, Watcher

logger = logging.getLogger("rmprune.amc")


@contextmanager
def search_bar(label: str, total: int, budget: float) -> Iterator[Watcher]:
    """Yields the watcher that moves the bar; costs are shown as parts of `budget`."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)

        def watch(result: SearchResult) -> None:
            best, done = result.best, len(result.episodes)
            text = f"{label}  best reward {best.reward:.4f} at {100 * best.cost / budget:.0f} % of the budget"
            progress.update(task, completed=done, description=text)
            if done == total or (not console.is_terminal and done % max(1, total // 4) == 0):
                logger.info("%s  (%d of %d episodes, %.0f s)", text, done, total, result.seconds)

        yield watch
