"""How much each unit of each group matters: one interface, several criteria.

A score is non-negative and larger for what should stay. Taylor scores are in units of the loss, so they compare
across layers and across reserved and computed channels; see each function for the others.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from rmprune.data.batches import NOT_RUN, OWN_LOSS, Batches, loss_parts, watch_passes
from rmprune.errors import ConfigError, DataError, UnsupportedModel
from rmprune.graph.network import is_batch_norm
from rmprune.graph.run import evaluating, hooked
from rmprune.graph.tensors import device_of
from rmprune.pruning.groups import Group, MemberSide, Scores, Structure, member_values, zero_scores
from rmprune.pruning.layers import by_input, by_output, channel_rows, weight_of
from rmprune.training.recentre import Moments

Importance = Callable[[nn.Module, Structure, Batches | None], Scores]
Spot = tuple[str, MemberSide]  # a layer, and what it reads or puts out


class NothingMatters(DataError):
    """No channel changes anything on these images."""


def batch_norm(model: nn.Module, structure: Structure, batches: Batches | None = None) -> Scores:
    """|scale| (network slimming, Liu et al. 2017), the mean over a group's batch norms times the number of its
    producers: like the cost, it adds up over the layers that lose a channel. A reserved copy's batch norm carries
    sqrt(var), the unit of a trained scale: the channel's standard deviation before the activation. Needs no data. Raises UnsupportedModel
    for a group without one.
    """

    def score(group: Group) -> Tensor:
        found = []
        for member in group.members:
            module = model.get_submodule(member.layer)
            if is_batch_norm(module) and isinstance(module.weight, Tensor):
                found.append(member_values(module.weight.detach().abs(), member).mean(1))
        if not found:
            raise UnsupportedModel(
                f"{group.name}: no batch norm to rank its channels by; use importance='taylor', "
                "or keep batch norms when removing residuals"
            )
        return torch.stack(found).mean(0) * len(group.producers)

    return {group.name: score(group) for group in structure.groups}


def magnitude(model: nn.Module, structure: Structure, batches: Batches | None = None) -> Scores:
    """L2 norm of the filters that compute a unit, summed over producers (Li et al. 2017). Needs no data."""

    def score(group: Group) -> Tensor:
        total = torch.zeros(group.units, dtype=torch.float64)
        for member in group.members:
            if member.side == "out":
                layer = model.get_submodule(member.layer)
                norms = by_output(layer, weight_of(model, member.layer).detach()).flatten(1).norm(dim=1)
                total += member_values(norms, member).square().sum(1).sqrt()
        return total

    return {group.name: score(group) for group in structure.groups}


def random(model: nn.Module, structure: Structure, batches: Batches | None = None) -> Scores:
    """Uniform noise, the same for the same group name and size: the control of every comparison."""

    def score(group: Group) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(group.name.encode()).digest()[:4], "big")
        return torch.rand(group.units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return {group.name: score(group) for group in structure.groups}


def taylor(model: nn.Module, structure: Structure, batches: Batches | None = None) -> Scores:
    """First-order change of the loss when a unit is set to zero (Molchanov et al. 2017): |sum over images and
    positions of activation * gradient| in each batch, summed over batches. Exact to first order for any
    activation: read at the consumers' inputs (of channels that meet in a product: at the outputs of the one factor). A loss may call the
    network several times: a unit is set to zero in all calls.
    """
    scores = zero_scores(structure, device_of(model))
    for effects in _effects(model, structure, batches, "taylor"):
        for name, effect in effects.items():
            scores[name] += effect.sum(0).abs()
    return scores


def taylor_squared(model: nn.Module, structure: Structure, batches: Batches | None = None) -> Scores:
    """The same, image by image: sqrt(mean of the squared effect) (Molchanov et al. 2019). Effects of opposite sign do
    not cancel, which is the better choice on a trained network, where they nearly do. Of a loss that calls the network several times, the
    first images of all calls are one, and so on. Raises DataError where calls have different numbers of them.
    """
    scores, images = zero_scores(structure, device_of(model)), 0
    for effects in _effects(model, structure, batches, "taylor_squared", by_image=True):
        count = len(next(iter(effects.values())))
        images += count
        for name, effect in effects.items():
            scores[name] += (effect * count).square().sum(0)  # the loss is a mean: undo its 1 / count
    return {name: (score / images).sqrt() for name, score in scores.items()}


def activation(model: nn.Module, structure: Structure, batches: Batches | None = None) -> Scores:
    """What the next layer would lose: the standard deviation of a unit's activation times the norm of the weights
    that read it, over the standard deviation of what the layer puts out (the mean is no loss: it can be folded
    into the bias). Summed in squares over consumers. Raises UnsupportedModel for channels that meet in a product.
    """
    data = need_data(batches, "activation")
    if paired := [group.name for group in structure.groups if group.paired]:
        raise UnsupportedModel(
            f"{paired[0]}: its channels meet in a product, which has no weights to rank them by; use importance='taylor'"
        )
    consumers = {m.layer: model.get_submodule(m.layer) for g in structure.groups for m in g.consumers}
    moments = {name: (Moments(), Moments()) for name in consumers}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for own, x in zip(moments[name], (inputs[0], output), strict=True):
            own.add(channel_rows(x, layer).T)

    hooks = (layer.register_forward_hook(partial(record, name)) for name, layer in consumers.items())
    watch_passes(data, model, hooks)
    scores = zero_scores(structure)
    for group in structure.groups:
        for member in group.consumers:
            variance, given = (own.square / own.count for own in moments[member.layer])
            total = given.sum().clamp(min=1e-30)
            layer = consumers[member.layer]
            weights = by_input(layer, by_output(layer, weight_of(model, member.layer).detach().double().square()))
            scores[group.name] += member_values(variance * weights / total, member).sum(1)
    return {name: score.sqrt() for name, score in scores.items()}


IMPORTANCES: Mapping[str, Importance] = {
    f.__name__: f for f in (batch_norm, taylor, taylor_squared, magnitude, activation, random)
}
MEASURED = ("taylor", "taylor_squared", "activation")
"""Those that need images."""


def need_data(batches: Batches | None, importance: str) -> Batches:
    """The batches that an importance is measured on. Raises ConfigError where there are none."""
    if batches is None:
        raise ConfigError(
            f"importance {importance!r} is measured on images: pass data, (images, labels) batches; for others {OWN_LOSS}"
        )
    return batches


def score_groups(
    importance: str | Mapping[str, Tensor] | Importance,
    model: nn.Module,
    structure: Structure,
    batches: Batches | None = None,
) -> Scores:
    """Scores by name, by a table {group or member layer: Tensor [units]} or by a callable; checked: one finite score for each unit. Raises
    ConfigError otherwise, and `NothingMatters` where all measured scores are 0."""
    if isinstance(importance, str):
        if importance not in IMPORTANCES:
            raise ConfigError(f"importance {importance!r} is unknown; there are: {', '.join(IMPORTANCES)}")
        scores: Any = IMPORTANCES[importance](model, structure, batches)
    elif isinstance(importance, Mapping):
        scores = {g.name: _look_up(importance, g) for g in structure.groups}
    elif callable(importance):
        scores = importance(model, structure, batches)
    else:
        raise ConfigError(f"importance is {importance!r}; give a name, a table of scores or a function")
    if not isinstance(scores, Mapping):
        raise ConfigError(
            f"importance gives a {type(scores).__name__}; let the function return a score for each unit, {{group: Tensor [units]}}"
        )
    checked = {}
    for group in structure.groups:
        score: Any = scores.get(group.name)
        if not _fits(score, group.units) or not bool(torch.isfinite(score).all()):
            raise ConfigError(
                f"importance of {group.name}: expected a tensor of {group.units} finite numbers, got {_seen(score)}"
            )
        checked[group.name] = score.detach().double().cpu()
    if importance in MEASURED and checked and not any(bool(score.any()) for score in checked.values()):
        raise NothingMatters(
            f"importance {importance!r}: every score is 0 on these images; they, or their labels, tell nothing apart"
        )
    return checked


def _fits(score: Any, count: int) -> TypeGuard[Tensor]:
    return isinstance(score, Tensor) and score.shape == (count,)


def _seen(score: Any) -> str:
    if not isinstance(score, Tensor):
        return type(score).__name__
    return f"shape {tuple(score.shape)}, finite: {bool(torch.isfinite(score).all())}"


def _look_up(table: Mapping[str, Tensor], group: Group) -> Tensor:
    if _fits(table.get(group.name), group.units):
        return table[group.name]
    own = [m for m in group.members if m.side != "in" and m.layer in table]
    for member in own:
        if not _fits(table[member.layer], member.size):
            raise ConfigError(
                f"importance of {member.layer}: expected a tensor of {member.size} numbers, one for each channel, got "
                f"{_seen(table[member.layer])}"
            )
    found = [member_values(table[m.layer], m).mean(1) for m in own]
    if not found:
        raise ConfigError(
            f"the importance table has no entry for {group.name} (or {', '.join(m.layer for m in group.members)})"
        )
    return torch.stack(found).mean(0)


@contextmanager
def _captured(modules: Mapping[Spot, nn.Module]) -> Iterator[list[tuple[Spot, Tensor]]]:
    """What layers read ("in") and put out ("zero") at these places in each call, a tensor of its own, so that a gradient belongs to one
    reader."""
    seen: list[tuple[Spot, Tensor]] = []

    def note(place: Spot, x: Tensor) -> Tensor:
        seen.append((place, x if x.requires_grad else x.detach().requires_grad_(True)))
        return seen[-1][1]

    def before(place: Spot, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (note(place, inputs[0].view_as(inputs[0])),)

    def after(place: Spot, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return note(place, output).clone()  # what follows may change it in place

    with hooked(
        module.register_forward_pre_hook(partial(before, place))
        if place[1] == "in"
        else module.register_forward_hook(partial(after, place))
        for place, module in modules.items()
    ):
        yield seen


def _effects(
    model: nn.Module, structure: Structure, batches: Batches | None, name: str, *, by_image: bool = False
) -> Iterator[dict[str, Tensor]]:
    """For each batch: {group: [images, units], sum over positions and calls of activation * gradient of the loss}; 0 where the loss does
    not go. `by_image`: raises DataError for calls with different numbers of images, which otherwise share rows."""
    data = need_data(batches, name)
    # Where a group's channels lie in what its readers read.
    at = {g.name: [((m.layer, m.side), m.index.to(device_of(model))) for m in g.readers] for g in structure.groups}
    modules = {(m.layer, m.side): model.get_submodule(m.layer) for g in structure.groups for m in g.readers}
    with evaluating(model), _captured(modules) as seen:

        def of_part(run: Callable[[], Tensor], count: int) -> dict[str, Tensor]:
            seen.clear()
            with torch.enable_grad():
                loss = run()
                if not seen:
                    raise DataError(NOT_RUN)
                gradients = torch.autograd.grad(loss, [x for _, x in seen], allow_unused=True)
            used = [(place, x, g) for (place, x), g in zip(seen, gradients, strict=True) if g is not None]
            if by_image:
                _refuse_unlike([(place, len(x)) for place, x, _ in used])
            # Windows of attention are several rows an image.
            images = math.gcd(count, *([len(x) for _, x, _ in used] or [len(x) for _, x in seen]))
            effects: dict[Spot, Tensor] = {}
            for place, x, g in used:
                own = _by_image(x.detach() * g, modules[place], images)
                effects[place] = effects[place] + own if place in effects else own
            return {
                g: torch.stack([effects[place][:, i].sum(2) for place, i in at[g] if place in effects]).sum(0)
                if any(place in effects for place, _ in at[g])
                else torch.zeros(images, len(at[g][0][1]), dtype=torch.float64, device=device_of(model))
                for g in at
            }

        for parts in loss_parts(data, model):
            found = [of_part(run, count) for run, count in parts]
            yield {g: torch.cat([own[g] for own in found]) for g in at}


def _refuse_unlike(rows: Iterable[tuple[Spot, int]]) -> None:
    first: dict[Spot, int] = {}
    for place, count in rows:
        if first.setdefault(place, count) != count:
            raise DataError(
                f"importance 'taylor_squared': {place[0]} is called with {first[place]} and with {count} images, which do not belong "
                "together one by one; take importance='taylor', or call the network with as many images each time"
            )


def _by_image(product: Tensor, layer: nn.Module, images: int) -> Tensor:
    """[images, channels]: the sum over positions, which lie before the channels in what a linear layer reads, else behind them."""
    rows = product if isinstance(layer, nn.Linear) else product.flatten(2).sum(2, dtype=torch.float64)
    return rows.reshape(images, -1, rows.shape[-1]).sum(1, dtype=torch.float64)
