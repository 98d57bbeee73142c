"""Exact removal of residual connections (RM, arXiv 2111.00687): the public names, nothing else."""

from rmprune.removal.remove import Removal, plan_removal, remove_residuals
from rmprune.removal.reports import BlockReport, Plan
from rmprune.removal.where_faster import remove_where_faster

__all__ = ["BlockReport", "Plan", "Removal", "plan_removal", "remove_residuals", "remove_where_faster"]
