"""The ways to choose widths that an amc run can compare: on which network, by which search. Searches nothing."""

from typing import NamedTuple

from rmprune.amc.search import SearchMethod


class AmcMethod(NamedTuple):
    """How a method chooses widths. `search`: None trains the original network at a smaller width from scratch.

    `mixed`: once the network is pruned, residuals are removed wherever that makes it faster, measured.
    """

    about: str
    plain: bool
    search: SearchMethod | None
    mixed: bool = False


AMC_METHODS: dict[str, AmcMethod] = {
    "rm-amc": AmcMethod("RM and fusing, then the agent on the plain network", True, "agent"),
    "rm-random": AmcMethod("RM and fusing, then random search with as many episodes", True, "random"),
    "rm-uniform": AmcMethod("RM and fusing, then the same fraction of every layer", True, "uniform"),
    "residual-amc": AmcMethod("residuals kept, coupled channels tied, then the agent", False, "agent"),
    "mixed-amc": AmcMethod(
        "as residual-amc, then RM, exactly, for those residuals whose removal makes the pruned network faster",
        False,
        "agent",
        mixed=True,
    ),
    "residual-random": AmcMethod("residuals kept, coupled channels tied, then random search", False, "random"),
    "uniform": AmcMethod("the original network at a smaller width multiplier, trained from scratch", False, None),
}
