"""A report written: tables, figures and the page of records, in files and on the screen. Reads records alone."""

import logging
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from rmprune.config import ReportConfig
from rmprune.errors import ArtifactError
from rmprune.report.figures import accuracy_against_time, save_figure
from rmprune.report.gather import gather
from rmprune.report.looks import looks, ranked
from rmprune.report.page import page
from rmprune.report.payload import payload
from rmprune.report.screen import refusals, summary_tables
from rmprune.report.search_figure import search_figure
from rmprune.report.tables import frame_of
from rmprune.runs.records import read_record
from rmprune.runs.writing import sweep_beside, write_text

logger = logging.getLogger("rmprune")
COMMAND = "command.txt"


def build_report(paths: list[Path] | Path, out_dir: Path, command: str | None = None) -> list[Path]:
    """Writes results.csv, a figure (PNG and SVG) for each model and data set and each search, index.html and command.txt;
    returns their paths.

    `paths`: record files, run directories, or directories that hold runs. What cannot be reported with the rest (no record, a
    damaged or newer one, one that would be averaged with another but differs in more than its seed) is left out, with a warning
    and a line on the page. Raises ArtifactError where nothing is left, or `out_dir` cannot be written.
    """
    records, left_out = gather([paths] if isinstance(paths, Path) else list(paths))
    for line in left_out:
        logger.warning("left out: %s", line)
    data = frame_of(records)
    command = command or shlex.join(sys.argv)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        written = [out_dir / "results.csv"]
        write_text(written[0], data.to_csv(index=False))
        if not data.empty:
            styles = looks(ranked(data))  # as on the page
            for title, stem, part in _parts(data):
                written += save_figure(accuracy_against_time(part, title, styles), out_dir / stem)
        for number, record in enumerate(records.values()):
            if (figure := search_figure(record)) is not None:
                stem = "search" if len(records) == 1 else f"search-{number + 1}"
                written += save_figure(figure, out_dir / stem)
        for name, text in (("index.html", page(payload(data, records, left_out, command))), (COMMAND, command + "\n")):
            written.append(write_text(out_dir / name, text))
        for path in written:
            sweep_beside(path)
    except OSError as error:
        raise ArtifactError(
            f"{out_dir}: the report cannot be written ({error.strerror}); choose another --out"
        ) from error
    return written


def renew_reports(runs: Iterable[Path], command: str) -> list[Path]:
    """Writes the `report/` of these run directories again, where there is one: `command` has measured their networks again.

    Returns the paths of the figures.
    """
    written: list[Path] = []
    for run in runs:
        made = run / "report" / COMMAND
        if made.is_file():
            first = made.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
            written += build_report(run, made.parent, f"{first}\n{command}")
    return [file for file in written if file.suffix == ".png"]


def run_report(config: ReportConfig, *, command: str) -> None:
    """`python -m rmprune report`: writes the report and prints where each of its files is."""
    console = Console(soft_wrap=True, highlight=False)
    for path in build_report(list(config.runs), config.out, command):
        console.print(str(path), markup=False)


def show(records: Any, console: Console | None = None) -> None:
    """Prints the tables of one record or several, given as paths or as dicts."""
    console = console or Console()
    for item in records if isinstance(records, list | tuple) else [records]:
        record = item if isinstance(item, dict) else read_record(item)
        for table in summary_tables(record):
            console.print(table)
        for line in refusals(record):
            console.print(line, markup=False)


def _parts(data: Any) -> list[tuple[str, str, Any]]:
    """Title, file name and rows of each figure: one for each model and data set."""
    groups = list(data.groupby(["model", "dataset"], sort=False, dropna=False))
    parts = []
    for (model, dataset), part in groups:
        name = "accuracy-time" if len(groups) == 1 else f"accuracy-time-{model}-{dataset}"
        parts.append((f"{model} on {dataset}", re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-"), part))
    return parts
