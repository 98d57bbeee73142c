"""One search from end to end: what to prune, what it costs, how policies are scored, the search, the verified policy. No training."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.amc.agent import AgentConfig
from rmprune.amc.environment import Environment
from rmprune.amc.scoring import Scorer, ScoringSettings, importance_order
from rmprune.amc.search import Search, SearchMethod, SearchResult, Watcher
from rmprune.amc.space import COSTS, Limits, Space, Widths, params_with
from rmprune.config import AmcConfig, MeasureConfig, SearchConfig
from rmprune.data.load import Dataset
from rmprune.data.splits import Split
from rmprune.errors import InfeasibleBudget, rounded
from rmprune.graph.shapes import record_shapes
from rmprune.measure import count_params
from rmprune.measure.place import Place, largest_within
from rmprune.pruning.constants import norms_behind
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Structure
from rmprune.pruning.importance import score_groups
from rmprune.pruning.layers import Cost, Weighted, sized_layers
from rmprune.pruning.prove import prove_cut, prove_groups
from rmprune.pruning.reading import read
from rmprune.pruning.surgery import note_cut, shrink
from rmprune.pruning.time_cost import TimeCost
from rmprune.runs.notes import remembered
from rmprune.training.job import Job
from rmprune.training.precision import compute_dtype


@dataclass(frozen=True)
class Chosen:
    """The policy of a search: its network (eval mode, recalibrated, not fine-tuned), widths, and facts for the record."""

    model: nn.Module
    widths: dict[str, int]
    facts: dict[str, Any]


def limits_of(config: SearchConfig) -> Limits:
    """The limits of a policy."""
    return Limits(lowest=config.lowest, highest=config.highest, multiple=config.multiple)


def network_cost(model: nn.Module, example: Tensor, cost: Cost) -> float:
    """The cost of a whole network as it is, by a cost of layers (macs, params)."""
    layers = sized_layers(model, example, record_shapes(model, example, Weighted))
    return sum(cost(layer, layer.cin, layer.cout) for layer in layers)


def make_space(network: nn.Module, original: nn.Module, example: Tensor, config: SearchConfig, ratio: float) -> Space:
    """The policies of `network` under `ratio` times the original's MACs or parameters, which are those that a record counts."""
    cost, budget = COSTS[config.constraint], ratio * whole_cost(original, example, config.constraint)
    if config.constraint == "params":
        cost = params_with(norms_behind(read(network, example)))
        budget -= count_params(network) - network_cost(network, example, cost)  # what no layer's width sets
    return Space(find_structure(network, example), cost, budget, limits_of(config))


def whole_cost(model: nn.Module, example: Tensor, constraint: str) -> float:
    """MACs or parameters of a whole network as it is."""
    return count_params(model) if constraint == "params" else network_cost(model, example, COSTS[constraint])


Measure = Callable[[Sequence[Widths]], Sequence[float]]
"""Costs of several policies' whole networks, as fractions of the original's, measured in turns with each other."""


class Timing:
    """Measured time as a constraint: the first backend, thread count and batch size of the measuring config."""

    def __init__(self, original: nn.Module, example: Tensor, config: MeasureConfig, cache: Path | None) -> None:
        self.original, self.example = original, example
        self.place = Place.first(config, original, example[:1])
        self.table = self.place.layer_times(cache)

    def measure(self, network: nn.Module, space: Space) -> Measure:
        """Measures policies of `network` as whole networks, in turns with the original."""

        def ratios(policies: Sequence[Widths]) -> list[float]:
            networks = {str(widths): _cut(network, space, widths) for widths in policies}
            found = self.place.ratios(networks)
            return [found[str(widths)] for widths in policies]

        return ratios

    def space(self, network: nn.Module, config: SearchConfig, ratio: float, note: Path) -> Space:
        """The policies of `network` under `ratio` times the original's time, by a table fitted to whole networks.

        Where the table is still off, uniform policies say by how much: the budget is what the table predicts for the
        largest of them that meets the measured one. It is noted in the file `note`, so that a search that goes on has the
        budget it began with.
        """
        structure = find_structure(network, self.example[:2])
        if self.table.fit == (1.0, 0.0):
            networks = {"original": self.original, **_examples(network, structure, config)}
            self.table.calibrate(networks, self.example[:1])
        cost = TimeCost(self.table, network, structure, self.example[:1])
        free = Space(structure, cost, float("inf"), limits_of(config))

        def budget() -> float:
            aim = ratio * self.table.predict(self.original, self.example[:1]) - cost.constant
            space = free.with_budget(max(aim, free.least_cost))  # a guess: what is measured decides
            return space.cost(meet_budget(space, space.uniform(), self.measure(network, space), ratio).widths)

        return free.with_budget(remembered(note, "budget", budget))


@dataclass(frozen=True)
class Goal:
    """What a search aims at: `ratio` of the original's cost, by the space's own cost or, with `timing`, as measured.

    `directory`: where the search keeps its files (None: nowhere, and nothing is resumed).
    """

    ratio: float
    timing: Timing | None = None
    directory: Path | None = None


def choose(
    network: nn.Module, space: Space, method: SearchMethod, job: Job[AmcConfig], goal: Goal,
    watch: Watcher | None = None,
) -> Chosen:  # fmt: skip
    """Search the space for the widths of `network`; in measured time the best policy is verified, and corrected, as a whole.

    Selection sees training images (importance, calibration) and a fixed part of the validation split (rewards), no others.
    `watch` is called after each episode. Raises InfeasibleBudget where no policy was measured within the goal, ArtifactError where
    the directory holds another search.
    """
    config = job.config.search
    cut_error = prove_groups(network, space.structure, job.data.train.example(2))  # once for all that the search cuts
    scorer = make_scorer(network, space, job)
    search = Search(
        Environment(space, scorer.accuracy, reward=config.reward), method=method, episodes=config.episodes,
        seed=job.seed, agent=AgentConfig(warm_up=config.warm_up, sigma=config.sigma, sigma_decay=config.sigma_decay),
        refine=config.refine, directory=goal.directory, identity=_identity(space, config, job.data),
    )  # fmt: skip
    result = search.run(watch)
    best = result.best.widths
    verified = Verified(best, goal.ratio * space.cost(best) / space.budget, 0)
    if (timing := goal.timing) is not None:
        find = lambda: dataclasses.asdict(meet_budget(space, best, timing.measure(network, space), goal.ratio))  # noqa: E731
        note = None if goal.directory is None else goal.directory / "verified.json"
        found = find() if note is None else remembered(note, str(list(best)), find)
        verified = Verified(**found | {"widths": tuple(found["widths"])})
    widths = {group.name: width for group, width in zip(space.groups, verified.widths, strict=True)}
    accuracy = result.best.accuracy if verified.widths == best else scorer.accuracy(verified.widths)
    model = scorer.build(verified.widths).cpu()
    own = prove_cut(network, space.structure, space.keep(verified.widths, scorer.order), job.data.train.example(2))
    note_cut(model, network, space.structure, own)
    facts = _facts(result, space, verified, accuracy, goal.ratio) | {"cut_error": max(cut_error, own)}
    return Chosen(model, widths, facts)


def make_scorer(network: nn.Module, space: Space, job: Job[AmcConfig]) -> Scorer:
    """The scorer of a network's policies, with everything it holds in memory, on the job's device."""
    config, network = job.config.search, job.here(network)
    scores = score_groups(config.importance, network, space.structure, job.batches)
    images, labels = first_images(job.data.validation, config.images, job.device)
    settings = ScoringSettings(dtype=compute_dtype(config.precision, job.device), reconstruct=config.reconstruct)
    calibration = first_images(job.data.train, config.calibration, job.device)[0]
    return Scorer(network, space, importance_order(scores), calibration, images, labels, settings)


def first_images(split: Split, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first `count` images of a split, as the split normalises them, and their labels; all if it has fewer."""
    batches = list(split.batches(512, device=device, limit=count))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _cut(network: nn.Module, space: Space, widths: Widths) -> nn.Module:
    """A network of this shape; its speed is that of the policy, whichever channels stay."""
    order = {group.name: torch.arange(group.units) for group in space.groups}
    return shrink(network, space.keep(widths, order), space.structure)[0].cpu().eval()


def _examples(network: nn.Module, structure: Structure, config: SearchConfig) -> dict[str, nn.Module]:
    """The network at a few uniform widths, for fitting the latency table."""
    free: Callable[..., float] = lambda layer, cin, cout: 1.0  # noqa: E731
    space = Space(structure, free, float("inf"), limits_of(config))
    found = {"whole": space.whole}
    for fraction in (0.75, 0.5, 0.3):
        found[f"{fraction:g}"] = space.execute([fraction] * len(space.groups))
    return {name: _cut(network, space, widths) for name, widths in found.items()}


def _identity(space: Space, config: SearchConfig, data: Dataset) -> dict[str, Any]:
    """What the result of a search depends on, besides its own settings and the network's weights."""
    return {
        "groups": [[group.name, group.units] for group in space.groups],
        "limits": [space.limits.lowest, space.limits.highest, space.limits.multiple],
        "constraint": config.constraint,
        "budget": float(f"{space.budget:.6g}") if config.constraint != "latency" else None,
        "scoring": [config.importance, config.reconstruct, config.images, config.calibration, config.precision],
        "data": [data.name, data.config.split_seed, data.config.validation],
    }


@dataclass(frozen=True)
class Verified:
    """A policy and the cost of its whole network, as a fraction of the original's; so many `networks` were measured."""

    widths: Widths
    ratio: float
    networks: int


def _facts(result: SearchResult, space: Space, verified: Verified, accuracy: float, ratio: float) -> dict[str, Any]:
    whole = {group.name: group.units for group in space.groups}
    return {
        "method": result.method,
        "seconds": result.seconds,
        "episodes_per_minute": 60 * len(result.episodes) / max(result.seconds, 1e-9),
        "best_episode": result.best.episode,
        "best_source": result.best.source,
        "best_reward": result.best.reward,
        "validation_accuracy": accuracy,
        "allowed_ratio": ratio,
        "predicted_ratio": ratio * space.cost(verified.widths) / space.budget,
        "verified_ratio": verified.ratio,
        "verified_networks": verified.networks,
        "widths": [
            {"group": name, "kept": width, "whole": whole[name]}
            for name, width in zip(whole, verified.widths, strict=True)
        ],
        "episodes": [
            {"source": e.source, "reward": e.reward, "accuracy": e.accuracy, "ratio": ratio * e.cost / space.budget}
            for e in result.episodes
        ],
    }


_FIRST_STEPS = (1.08, 0.92, 0.85)  # times the predicted cost of the policy


def meet_budget(space: Space, widths: Widths, measure: Measure, allowed: float) -> Verified:
    """The largest policy of this shape whose network, measured as a whole, takes at most `allowed` of the original's cost.

    The policy is scaled up and down as `measure.place.largest_within` asks, which says what is promised. Raises InfeasibleBudget
    where not even its narrowest network was within the budget.
    """
    fractions, size = space.fractions(widths), space.cost(widths)

    def at(cost: float) -> Widths:
        return space.with_budget(max(cost, space.least_cost)).fit(fractions)

    def refuse(least: float) -> InfeasibleBudget:
        return InfeasibleBudget(
            f"no policy measured as a whole network met the budget of {allowed:.3g} times the original; the narrowest took "
            f"{rounded(least, 3):.3g}: raise the budget or lower the limits (lowest={space.limits.lowest})"
        )

    first = [widths, *(at(step * size) for step in _FIRST_STEPS)]
    found = largest_within(
        allowed, at, space.cost, measure, space.least_cost, space.full_cost, first=first, refuse=refuse
    )
    return Verified(found.candidate, found.ratio, found.networks)
