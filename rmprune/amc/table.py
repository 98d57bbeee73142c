"""The ways to choose widths that an amc run can compare: on which network, by which search. Searches nothing."""

from typing import Literal, NamedTuple

from rmprune.amc.search import SearchMethod


class AmcMethod(NamedTuple):
    """How a method chooses widths. `search`: None trains the original network at a smaller width from scratch.

    `start`: the network whose widths are chosen: the trained one, that without residuals, or what --plan makes of the blocks.
    `mixed`: once the network is pruned, residuals are removed wherever that makes it faster, measured.
    """

    about: str
    start: Literal["dense", "plain", "planned"]
    search: SearchMethod | None
    mixed: bool = False

    @property
    def reads_removal(self) -> bool:
        """Whether the settings of a removal say anything about what it makes."""
        return self.mixed or self.start != "dense"


AMC_METHODS: dict[str, AmcMethod] = {
    "rm-amc": AmcMethod("RM and fusing, then the agent on the plain network", "plain", "agent"),
    "rm-random": AmcMethod("RM and fusing, then random search with as many episodes", "plain", "random"),
    "rm-uniform": AmcMethod("RM and fusing, then the same fraction of every layer", "plain", "uniform"),
    "residual-amc": AmcMethod("residuals kept, coupled channels tied, then the agent", "dense", "agent"),
    "mixed-amc": AmcMethod(
        "as residual-amc, then RM, exactly, for those residuals whose removal makes the pruned network faster",
        "dense",
        "agent",
        mixed=True,
    ),
    "residual-random": AmcMethod("residuals kept, coupled channels tied, then random search", "dense", "random"),
    "plan-amc": AmcMethod("the blocks as --plan says, then the agent; its widths are not read", "planned", "agent"),
    "plan-random": AmcMethod("the same network, then random search with as many episodes", "planned", "random"),
    "plan-uniform": AmcMethod("the same network, then the same fraction of every layer", "planned", "uniform"),
    "uniform": AmcMethod("the original network at a smaller width multiplier, trained from scratch", "dense", None),
}
