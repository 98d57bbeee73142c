"""Where 0.1.0 had `find_structure`; it stands in `find_groups`, and `rmprune.pruning` gives it."""

from rmprune.pruning.find_groups import find_structure

__all__ = ["find_structure"]
