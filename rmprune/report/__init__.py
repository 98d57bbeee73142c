"""Tables, figures and a page from the records of runs; records are all it reads."""

from rmprune.report.build import build_report, renew_reports, run_report, show
from rmprune.report.screen import summary_tables
from rmprune.report.tables import frame

__all__ = ["build_report", "frame", "renew_reports", "run_report", "show", "summary_tables"]
