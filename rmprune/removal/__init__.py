"""Exact removal of residual connections (RM, arXiv 2111.00687): the public names, nothing else."""

from rmprune.removal.remove import Removal, plan_removal, remove_residuals
from rmprune.removal.rewrite import BlockReport

__all__ = ["BlockReport", "Removal", "plan_removal", "remove_residuals"]
