"""The cells of a run: one seed with one budget each, and where they are kept."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rmprune.runs import records

logger = logging.getLogger("rmprune")


@dataclass(frozen=True)
class Cell:
    """One seed with one budget, `kind` (macs_ratio, ...; "": none) and `value`: a record of its own, in `directory`.

    `shared` holds what all cells of the seed have in common.
    """

    seed: int
    kind: str
    value: float
    directory: Path
    shared: Path
    memory: float | None = None
    """The memory_ratio that holds beside it."""

    @property
    def record(self) -> Path:
        """Where the cell's record is, or will be."""
        return self.directory / records.RECORD

    @property
    def budget(self) -> dict[str, float]:
        """As a record says it."""
        beside = {} if self.memory is None else {"memory_ratio": self.memory}
        return {self.kind: self.value} | beside if self.kind else {}


def plan_cells(
    root: Path, seed: int, seeds: int, budgets: list[tuple[str, float]], memory: float | None = None
) -> list[Cell]:
    """The cells in the order they are done: `seeds` seeds from `seed` on, each with every (kind, value) of `budgets`.

    A single cell is the run directory itself.
    """
    if seeds == 1 and len(budgets) == 1:
        return [Cell(seed, *budgets[0], root, root, memory)]
    return [
        Cell(
            one,
            kind,
            value,
            root / f"seed{one}" / (f"{kind}-{value:g}" if kind else "plan"),
            root / f"seed{one}",
            memory,
        )
        for one in range(seed, seed + seeds)
        for kind, value in budgets
    ]


def unfinished(cells: list[Cell]) -> Iterator[Cell]:
    """The cells that have no record yet; of several cells, each is announced in the log as its turn comes."""
    for number, cell in enumerate(cells, 1):
        if cell.record.is_file():
            continue
        if len(cells) > 1:
            logger.info("cell %d of %d: seed %d, %s %g", number, len(cells), cell.seed, cell.kind, cell.value)
        yield cell
