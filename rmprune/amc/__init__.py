"""Widths by an agent (AMC): agent, space and environment, scoring, search, and what becomes of the best policy."""
