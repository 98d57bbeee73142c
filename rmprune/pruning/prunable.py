"""A network and what can be pruned of it: as it is, or, where sizes that code writes hold what a budget needs, as a graph in which others
can be written. Decides no widths."""

import logging
import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from rmprune.graph.inputs import Given
from rmprune.pruning.allocate import least_cost
from rmprune.pruning.budget import Budget, resolve
from rmprune.pruning.find_groups import NothingToPrune, find_structure
from rmprune.pruning.groups import Structure
from rmprune.pruning.layers import Cost, Weighted
from rmprune.pruning.reading import Reading, read
from rmprune.pruning.written_sizes import as_graph

logger = logging.getLogger("rmprune")


def find_prunable(
    model: nn.Module, inputs: tuple[Tensor, ...], budget: Budget | None = None, cost: Cost | None = None,
    origin: Mapping[str, int] | None = None,
    settle: Callable[[Structure, nn.Module], Structure] = lambda structure, _: structure, *, values: bool = False,
) -> tuple[nn.Module, Reading, Structure]:  # fmt: skip
    """The network, what was read of it (`values`: with its weights), and its groups, less those that `settle` leaves whole.

    The network is `model`, or a torch.fx graph of the same layers where nothing can be pruned else, or not enough for the budget (of
    MACs, channels or, with `cost`, time); the log says so. Raises UnsupportedModel as `find_structure` does.
    """

    def attempt(network: nn.Module) -> tuple[nn.Module, Reading, Structure]:
        kept = inputs.kept if isinstance(inputs, Given) and inputs.network is network else {}
        if values not in kept:
            reading = read(network, inputs, values=values)
            kept[values] = reading, find_structure(network, inputs, reading=reading)
        reading, structure = kept[values]
        if reading.network.sizes_note:
            logger.warning("prune: %s", reading.network.sizes_note)
        return network, reading, settle(structure, network)

    def least_of(structure: Structure) -> tuple[float, float]:
        if budget is None or budget.name == "memory_ratio" or (budget.latency_ratio is not None and cost is None):
            return 0.0, 0.0
        target = resolve(structure, budget, cost, memory=True)
        return least_cost(structure, budget, target.cost, {**structure.units, **(origin or {})}), target.limit

    try:
        found = attempt(model)
        least, limit = least_of(found[2])
        if least <= limit or (graph := as_graph(model, inputs)) is None:
            return found
    except NothingToPrune:
        if isinstance(model, Weighted) or (graph := as_graph(model, inputs)) is None:
            raise
        least = math.inf
    written = attempt(graph)
    if least < math.inf and least_of(written[2])[0] >= least:
        return found
    logger.warning(
        "prune: what holds its channels is written for their number; the result is a torch.fx graph of the same layers, in eval mode, with "
        "other sizes written"
    )
    return written
