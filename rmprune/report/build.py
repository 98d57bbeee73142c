"""A report written: tables, figures and the page of records, in files and on the screen. Reads records alone."""

import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from rmprune.config import ReportConfig
from rmprune.errors import ArtifactError
from rmprune.report.comparable import refuse_mixtures
from rmprune.report.figures import accuracy_against_time, save_figure
from rmprune.report.page import page
from rmprune.report.search_figure import search_figure
from rmprune.report.tables import frame, refusals, summary_tables
from rmprune.runs.records import find_records, read_record
from rmprune.runs.writing import write_text

COMMAND = "command.txt"


def build_report(paths: list[Path] | Path, out_dir: Path, command: str | None = None) -> list[Path]:
    """Writes results.csv, a figure (PNG and SVG) for each model and data set, index.html and command.txt; returns their
    paths.

    `paths`: record files, run directories, or directories that hold runs. Raises ArtifactError where a path holds no
    record, a record is damaged, records would be averaged that differ in more than their seed, or `out_dir` cannot be
    written.
    """
    records = find_records([paths] if isinstance(paths, Path) else list(paths))
    refuse_mixtures(records)
    data = frame(records)
    command = command or shlex.join(sys.argv)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        written = [out_dir / "results.csv"]
        write_text(written[0], data.to_csv(index=False))
        svgs = {}
        if not data.empty:
            for title, stem, part in _parts(data):
                figure_paths = save_figure(accuracy_against_time(part, title), out_dir / stem)
                svgs[title] = figure_paths[1]
                written += figure_paths
        for number, record in enumerate(records):
            if (figure := search_figure(read_record(record))) is not None:
                stem = "search" if len(records) == 1 else f"search-{number + 1}"
                written += save_figure(figure, out_dir / stem)
        read = [read_record(record) for record in records]
        for name, text in (("index.html", page(data, svgs, read, command)), (COMMAND, command + "\n")):
            written.append(write_text(out_dir / name, text))
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
            first = made.read_text().partition("\n")[0]
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
