"""What networks of a run cost: where its time counts, the table of layer times kept beside it, and costs as its budget counts them."""

import math
from collections.abc import Mapping

from torch import nn

from rmprune.config import SlimConfig
from rmprune.measure import activation_memory, count_macs
from rmprune.measure.latency_model import LatencyModel
from rmprune.measure.place import Place
from rmprune.pruning import Budget
from rmprune.pruning.peak_memory import byte_limit
from rmprune.training.job import Job


def layer_times(job: Job[SlimConfig], place: Place) -> LatencyModel:
    """The table of layer times of a run, which is kept in its directory."""
    backend, _, threads, batch_size = place.configuration
    return place.layer_times(job.config.directory / f"layer-times-{backend}-{threads}-{batch_size}.json")


def place_of(job: Job[SlimConfig]) -> Place:
    """Where time counts: the first configuration of the settings, relative to the trained original."""
    return Place.first(job.config.measure, job.original, job.data.train.example(1))


def cost_ratios(budget: Budget, job: Job[SlimConfig], networks: Mapping[str, nn.Module]) -> Mapping[str, float]:
    """Their costs as fractions of the original's, as the budget counts; infinite where memory must hold as well and does not."""
    example, most = job.data.train.example(1), byte_limit(budget)
    peaks = {name: activation_memory(own, example).peak_bytes for name, own in networks.items() if most < math.inf}
    if budget.memory_ratio is not None and budget.name == "memory_ratio":
        return {name: budget.memory_ratio * peak / most for name, peak in peaks.items()}
    if budget.latency_ratio is not None:
        found: Mapping[str, float] = place_of(job).ratios(networks)
    else:
        found = {name: count_macs(own, example) / (budget.reference_macs or 1) for name, own in networks.items()}
    return {name: math.inf if peaks.get(name, 0) > most else cost for name, cost in found.items()}
