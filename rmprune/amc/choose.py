"""One search from end to end: what to prune, what it costs, how policies are scored, the search, the verified policy. No training."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmprune.amc.agent import AgentConfig
from rmprune.amc.environment import Environment
from rmprune.amc.scoring import Scorer, Settings, importance_order
from rmprune.amc.search import Method, Search, SearchResult, Watcher
from rmprune.amc.space import COSTS, Limits, Space, Widths
from rmprune.config import MeasureConfig, SearchConfig
from rmprune.data.load import Dataset
from rmprune.data.splits import Split
from rmprune.errors import InfeasibleBudget
from rmprune.measure.latency_model import LatencyModel
from rmprune.measure.place import Place
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.groups import Cost, Structure, describe_layer, record_shapes
from rmprune.pruning.importance import score_groups
from rmprune.pruning.surgery import shrink
from rmprune.pruning.time_cost import TimeCost, calibrate
from rmprune.runs.notes import remembered
from rmprune.training.precision import compute_dtype

IMPORTANCE_IMAGES = 2048  # training images that importance is measured on


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
    shapes = record_shapes(model, example)
    layers = [describe_layer(name, module, shapes) for name, module in model.named_modules()]
    return sum(cost(layer, layer.cin, layer.cout) for layer in layers if layer is not None)


def make_space(network: nn.Module, original: nn.Module, example: Tensor, config: SearchConfig, ratio: float) -> Space:
    """The policies of `network` under `ratio` times the original's MACs or parameters."""
    cost = COSTS[config.constraint]
    budget = ratio * network_cost(original, example, cost)
    return Space(find_structure(network, example), cost, budget, limits_of(config))


Measure = Callable[[Sequence[Widths]], Sequence[float]]
"""Costs of several policies' whole networks, as fractions of the original's, measured in turns with each other."""


class Timing:
    """Measured time as a constraint: the first backend, thread count and batch size of the measuring config."""

    def __init__(self, original: nn.Module, example: Tensor, config: MeasureConfig, cache: Path | None) -> None:
        self.original, self.example = original, example
        self.place = Place.first(config, original, example[:1])
        self.table = LatencyModel(
            self.place.backend, threads=self.place.threads, batch_size=self.place.batch_size, cache=cache
        )

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
            calibrate(
                self.table, {"original": self.original, **_examples(network, structure, config)}, self.example[:1]
            )
        cost = TimeCost(self.table, network, structure, self.example[:1])
        free = Space(structure, cost, float("inf"), limits_of(config))

        def budget() -> float:
            aim = ratio * self.table.predict(self.original, self.example[:1]) - cost.constant
            space = free.with_budget(max(aim, free.least_cost))  # a guess: what is measured decides
            return space.cost(meet_budget(space, space.uniform(), self.measure(network, space), ratio).widths)

        return free.with_budget(remembered(note, "budget", budget))


def choose(
    network: nn.Module,
    space: Space,
    method: Method,
    config: SearchConfig,
    data: Dataset,
    *,
    seed: int,
    device: torch.device,
    ratio: float,
    directory: Path | None = None,
    timing: Timing | None = None,
    watch: Watcher | None = None,
) -> Chosen:
    """Search the space for the widths of `network`; with `timing` the best policy is verified, and corrected, as a whole.

    Selection sees training images (importance, calibration) and a fixed part of the validation split (rewards), no others.
    """
    scorer = make_scorer(network, space, config, data, device)
    environment = Environment(space, scorer.accuracy, reward=config.reward)
    agent = AgentConfig(warm_up=config.warm_up, sigma=config.sigma, sigma_decay=config.sigma_decay)
    search = Search(
        environment,
        method=method,
        episodes=config.episodes,
        seed=seed,
        agent=agent,
        refine=config.refine,
        directory=directory,
        identity=_identity(space, config, data),
    )
    result = search.run(watch)
    best = result.best.widths
    if timing is None:
        verified = Verified(best, ratio * space.cost(best) / space.budget, 0)
    else:
        find = lambda: dataclasses.asdict(meet_budget(space, best, timing.measure(network, space), ratio))  # noqa: E731
        found = find() if directory is None else remembered(directory / "verified.json", str(list(best)), find)
        verified = Verified(**found | {"widths": tuple(found["widths"])})
    widths = {group.name: width for group, width in zip(space.groups, verified.widths, strict=True)}
    accuracy = result.best.accuracy if verified.widths == best else scorer.accuracy(verified.widths)
    return Chosen(scorer.build(verified.widths).cpu(), widths, _facts(result, space, verified, accuracy, ratio))


def make_scorer(network: nn.Module, space: Space, config: SearchConfig, data: Dataset, device: torch.device) -> Scorer:
    """The scorer of a network's policies, with everything it holds in memory."""
    network = copy.deepcopy(network).to(device)
    batches = list(data.train.batches(128, device=device, limit=IMPORTANCE_IMAGES))
    scores = score_groups(config.importance, network, space.structure, batches)
    images, labels = first_images(data.validation, config.images, device)
    settings = Settings(dtype=compute_dtype(config.precision, device), reconstruct=config.reconstruct)
    calibration = first_images(data.train, config.calibration, device)[0]
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


_FIRST_STEPS = (1.0, 1.08, 0.92, 0.85)  # times the predicted cost of the policy
_POINTS = 4  # policies measured at once from then on


def meet_budget(
    space: Space,
    widths: Widths,
    measure: Measure,
    target: float,
    *,
    slack: float = 0.05,
    margin: float = 0.01,
    rounds: int = 5,
) -> Verified:
    """The policy of this shape whose network, measured as a whole, costs between (1 - slack) * target and target.

    The policy is scaled up and down and several sizes are measured at once, ever closer to the largest that costs at most
    (1 - margin) * target; that one is measured once more and must be below the target again. `target` is a fraction of the
    original's cost. Where widths are too coarse for the slack, the costliest policy below the target is taken. Raises
    InfeasibleBudget where none was below.
    """
    fractions, size = space.fractions(widths), space.cost(widths)
    tried: dict[Widths, float] = {}
    plan = [widths, *(_scaled(space, fractions, step * size) for step in _FIRST_STEPS[1:])]
    for _ in range(rounds):
        new = [policy for policy in dict.fromkeys(plan) if policy not in tried]
        if not new:
            break
        tried |= dict(zip(new, measure(new), strict=True))
        best = _largest_below(tried, (1 - margin) * target)
        while best is not None and tried[best] >= (1 - slack) * target:
            again = measure([best])[0]
            if again <= target:
                return Verified(best, again, len(tried))
            tried[best] = again
            best = _largest_below(tried, (1 - margin) * target)
        low = space.least_cost if best is None else space.cost(best)
        high = min(
            (space.cost(w) for w, r in tried.items() if r > target and space.cost(w) > low), default=space.full_cost
        )
        plan = [
            _scaled(space, fractions, low * (high / low) ** (i / _POINTS)) for i in range(_POINTS + (best is not None))
        ]
    best = _largest_below(tried, target)
    if best is None:
        raise InfeasibleBudget(
            f"no policy of {len(tried)} measured as whole networks met the budget of {target:.3g} times the original; the "
            f"nearest took {min(tried.values()):.3g}: raise the budget or lower the limits (lowest={space.limits.lowest})"
        )
    return Verified(best, tried[best], len(tried))


def _largest_below(tried: Mapping[Widths, float], limit: float) -> Widths | None:
    """The costliest of the measured policies that cost at most `limit`."""
    return max((w for w, ratio in tried.items() if ratio <= limit), key=lambda w: tried[w], default=None)


def _scaled(space: Space, fractions: Sequence[float], budget: float) -> Widths:
    return space.with_budget(max(budget, space.least_cost)).fit(fractions)
