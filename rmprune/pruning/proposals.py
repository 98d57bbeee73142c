"""Plans by a surrogate: what a choice of every block and a width of every group cost and lose, as a program for `multiple_choice`.

Networks that are seen: the original, the one without any residual that can go (RM), the one whose blocks are all merged, and that of RM
with its linear pairs multiplied. A layer
that stands in a block counts where the block is what that network has there; a layer outside of blocks always counts. The map between
two blocks has a width of its own, as in the network without residuals. Where a block stays, or vanishes, and its shortcut is the
identity, the maps before and after it have the same width and keep the same channels: what that loses besides (the original's tied
group against the free ones) its blocks share equally. A block that is fused has the layers of one that is removed, but for each pair that
the fourth network multiplies there, its product. That all these losses add up is assumed, see `rmprune.pruning.surrogate`; they do not
quite, so what plans turned out to lose (`learned`) says what to believe of narrow, merged and dropped parts in the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from rmprune.graph.network import flat_name
from rmprune.pruning.groups import Structure
from rmprune.pruning.layers import Cost, SizedLayer
from rmprune.pruning.multiple_choice import Answer, Problem, Question, Term, solve
from rmprune.pruning.options import BlockLayers, BlockMembers
from rmprune.pruning.plan import Choice

LEVELS = 8  # widths of a group that a program chooses among, at most
WEIGHED = ("widths", "merge", "drop")  # of losses, which are believed each by a factor
_SLIGHT = 0.01  # nats: differences below it say nothing
_PRIOR = 0.1  # what speaks for a factor being 1, where a plan weighs 1


@dataclass(frozen=True)
class Sight:
    """One of these networks: what its layers cost at any widths, the widths its groups may have (units, ascending), and the KL of
    each where that group alone is so narrow."""

    structure: Structure
    cost: Cost
    widths: Mapping[str, Sequence[int]]
    losses: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Proposal:
    """blocks: {block: choice}; widths: {layer by its flat name: units of the group it puts out}; what the surrogate says of it.

    parts: {kind of WEIGHED: what that loses as it was measured}; `loss` is their sum, each times what it is believed by.
    """

    blocks: dict[str, Choice]
    widths: dict[str, int]
    cost: float
    loss: float
    parts: dict[str, float]


def learned(parts: Sequence[Mapping[str, float]], realised: Sequence[float]) -> dict[str, float]:
    """{kind of WEIGHED: what to multiply its losses by}, from plans' `parts` and what these plans turned out to lose.

    By ratios of what was said to what came, under a loss that few plans far off do not decide; 1 where no plan says anything.
    """
    said = np.array([[own[kind] for kind in WEIGHED] for own in parts]).reshape(-1, len(WEIGHED))
    came = np.log(np.maximum(np.array(realised, dtype=float), 0.0) + _SLIGHT)

    def off(logs: np.ndarray) -> np.ndarray:
        return np.concatenate([np.log(said @ np.exp(logs) + _SLIGHT) - came, _PRIOR * logs])

    found = least_squares(off, np.zeros(len(WEIGHED)), loss="cauchy", f_scale=0.2)
    return {kind: float(np.exp(value)) for kind, value in zip(WEIGHED, found.x, strict=True)}


def thinned(widths: Sequence[int]) -> list[int]:
    """At most LEVELS of these widths, the ends among them, each about the same part of the next: small budgets leave narrow groups."""
    if len(widths) <= LEVELS:
        return list(widths)
    step = (widths[-1] / widths[0]) ** (1 / (LEVELS - 1))
    return sorted({min(widths, key=lambda width: abs(width - widths[0] * step**i)) for i in range(LEVELS)})


class Proposals:
    """The program of one network, and what was proposed before.

    sights: of "keep", "remove", "merge" and "fuse"; layers: of each block that can be followed; losses: {block: {choice: KL}}. A block
    that does not read one map and put out one is as the network without residuals has it; one whose branch reads in groups, and so has
    other widths than its one convolution, is not merged. belief: see `learned`.
    """

    def __init__(
        self,
        sights: Mapping[Choice, Sight],
        layers: Mapping[str, BlockLayers],
        losses: Mapping[str, Mapping[Choice, float]],
        belief: Mapping[str, float] | None = None,
    ) -> None:
        self.sights, self.layers = sights, layers
        self._belief = dict.fromkeys(WEIGHED, 1.0) | dict(belief or {})
        self._problem = Problem()
        self._named: list[tuple[str, str, Sequence[int]]] = []  # layer, the question of its width, the answers to it
        self._members: dict[Choice, BlockMembers] = {
            c: BlockMembers.of(sight.structure, layers) for c, sight in sights.items() if c != "fuse"
        }
        self.losses = {
            name: {c: lost for c, lost in own.items() if c != "merge" or name not in layers or self._as_wide(c, name)}
            or dict(own)
            for name, own in losses.items()
        }
        self._ports = {name: ports for name in layers if (ports := self._find_ports(name)) is not None}
        self._others: dict[str, Choice] = {
            name: next(choice for choice in ("remove", "keep", *own) if choice in own)
            for name, own in self.losses.items()
            if name not in self._ports
        }
        self._constant = 0.0
        for name in self._ports:
            self._problem.questions[name] = Question(len(self.losses[name]))
        self._write_outside()
        for name in self._ports:
            for choice in self.losses[name]:
                self._write_block(name, choice)
        if "fuse" in sights:
            self._write_pairs()

    def believing(self, belief: Mapping[str, float]) -> Proposals:
        """The same program with other factors."""
        return Proposals(self.sights, self.layers, self.losses, belief)

    def best(
        self, limit: float, *, other_than: Iterable[Mapping[str, Choice]] = (), apart: int = 1,
        near: Mapping[str, Choice] | None = None, changes: int = 1,
    ) -> Proposal | None:  # fmt: skip
        """The plan of the least loss whose layers cost at most `limit`, or None.

        other_than: choices, each of all blocks, of which it makes `apart` at least otherwise; near: choices of which it makes `changes`
        at most otherwise, one that a block does not have among them.
        """
        tabu = [self._numbers(choices) for choices in other_than]
        centre = None if near is None else (self._numbers(near), changes)
        found = solve(self._problem, limit - self._constant, other_than=tabu, apart=apart, near=centre)
        if found is None:
            return None
        blocks = {name: list(self.losses[name])[found.answers[name]] for name in self._ports}
        widths = {layer: at[found.answers[asked]] for layer, asked, at in self._named if asked in found.answers}
        parts = {k: sum(self.losses[b][c] for b, c in blocks.items() if c == k) for k in WEIGHED}
        of_blocks = sum(self._belief[kind] * part for kind, part in parts.items())
        parts["widths"] = max(found.loss - of_blocks, 0.0) / self._belief["widths"]
        return Proposal(blocks | self._others, widths, found.cost + self._constant, found.loss, parts)

    def least_cost(self) -> float:
        """The least that any plan costs."""
        found = solve(self._problem, None)
        assert found is not None
        return found.cost + self._constant

    def _numbers(self, choices: Mapping[str, Choice]) -> dict[str, int]:
        """The answers that these are, "remove" for one that a block does not have (notes of before know no "fuse"); -1 for no answer."""

        def number(own: list[Choice], choice: Choice) -> int:
            return next((own.index(c) for c in (choice, "remove") if c in own), -1)

        return {name: number(list(self.losses[name]), choices[name]) for name in self._ports}

    def _where(self, name: str, *choices: Choice) -> tuple[Answer, ...]:
        """The answers that are one of these choices of a block; none of a block that no choice is left to."""
        own = self.losses[name] if name in self._ports else ()
        return tuple((name, number) for number, choice in enumerate(own) if choice in choices)

    def _find_ports(self, name: str) -> tuple[str | None, str | None] | None:
        """The groups before and after a block in the network without residuals (None: of a fixed width); None where it has several."""
        found = [members.ports(name) for members in self._members.values()]
        if any(len(before) > 1 or len(after) > 1 for before, after in found) or name not in self.losses:
            return None
        if not self._as_wide("keep", name) or ("merge" in self.losses[name] and not self._as_wide("merge", name)):
            return None
        before, after = self._members["remove"].ports(name)
        return next(iter(before), None), next(iter(after), None)

    def _as_wide(self, choice: Choice, name: str) -> bool:
        """Whether the maps before and after a block may have the widths that they may have without residuals."""
        plain, own = self.sights["remove"].widths, self.sights[choice].widths
        pairs = zip(*(self._members[c].ports(name) for c in ("remove", choice)), strict=True)
        return all([plain[group] for group in mine] == [own[group] for group in theirs] for mine, theirs in pairs)

    def _ask(self, choice: Choice, group: str, where: tuple[Answer, ...] = ()) -> str:
        """The question how wide a group of a sight is."""
        asked, sight = f"{choice}: {group}", self.sights[choice]
        if asked not in self._problem.questions:
            loss = self._belief["widths"] * np.array(sight.losses[group], dtype=float)
            self._problem.questions[asked] = Question(len(loss), where)
            self._problem.terms.append(Term((asked,), np.zeros_like(loss), loss, where))
            for layer in sight.structure.group(group).producers:
                self._named.append((flat_name(layer), asked, sight.widths[group]))
        return asked

    def _write_outside(self) -> None:
        members = self._members["remove"]
        for layer in self.sights["remove"].structure.layers:
            if members.block.get(layer.name) not in self._ports:
                self._write_layer("remove", layer, None, ())

    def _write_block(self, name: str, choice: Choice) -> None:
        where = self._where(name, choice)
        lost = np.array(self._belief.get(choice, 1.0) * self.losses[name][choice])
        self._problem.terms.append(Term((), np.array(0.0), lost, where))
        if choice in ("remove", "fuse"):
            where = self._where(name, "remove", "fuse")
            if where[0] != self._where(name, choice)[0]:
                return  # written with the first of the two
        place: Choice = "keep" if choice == "drop" else "remove" if choice == "fuse" else choice
        members = self._members[place]
        for layer in self.sights[place].structure.layers:
            if members.block.get(layer.name) == name and (choice != "drop" or layer.name in members.way):
                self._write_layer(place, layer, name, where)
        before, after = (group and self._ask("remove", group) for group in self._ports[name])
        if after is not None and (choice in ("drop", "merge")):
            self._named.append(
                (f"{flat_name(name)}_conv", after, self.sights["remove"].widths[self._ports[name][1] or ""])
            )
        kept = self._members["keep"].ports(name)
        if choice in ("keep", "drop") and kept[0] and kept[0] == kept[1] and before != after:
            assert before is not None and after is not None
            self._problem.equal.append((before, after, where))
            loss = self._belief["widths"] * self._tied(next(iter(kept[0])))
            self._problem.terms.append(Term((before,), np.zeros_like(loss), loss, where))

    def _write_pairs(self) -> None:
        """Each pair of layers that is multiplied where the block that it belongs to is fused: its product in the place of both."""
        whole, members = self.sights["remove"].structure.layers, self._members["remove"].block
        products = {layer.name: layer for layer in self.sights["fuse"].structure.layers}
        for second in whole:
            product = products.get(second.name, second)
            if product.inputs == second.inputs:
                continue
            firsts = [x for x in whole if x.inputs == product.inputs and x.outputs == second.inputs]
            blocks = [members[x.name] for x in (*firsts, second) if x.name in members]
            if len(firsts) != 1 or not blocks or not (where := self._where(blocks[0], "fuse")):
                continue
            for other in self._ports.keys() & set(blocks[1:]):
                self._problem.needs.append((where[0], self._where(other, "remove", "fuse")))
            self._write_layer("remove", product, None, where, self.sights["fuse"].cost)
            for layer in (*firsts, second):
                self._write_layer("remove", layer, None, where, sign=-1)

    def _tied(self, stream: str) -> np.ndarray:
        """What each block that ties this group of the original adds to the losses of the free groups."""
        kept, plain = self.sights["keep"], self.sights["remove"]
        producers = {flat_name(layer) for layer in kept.structure.group(stream).producers}
        free = [g.name for g in plain.structure.groups if producers & {flat_name(layer) for layer in g.producers}]
        free = [name for name in free if len(plain.losses[name]) == len(kept.losses[stream])]
        excess = np.array(kept.losses[stream], dtype=float) - sum(np.array(plain.losses[name]) for name in free)
        return np.maximum(excess, 0.0) / max(len(free) - 1, 1)

    def _write_layer(
        self, choice: Choice, layer: SizedLayer, block: str | None, where: tuple[Answer, ...], cost: Cost | None = None,
        sign: int = 1,
    ) -> None:  # fmt: skip
        """What a layer costs at every width of what it reads and puts out; of several groups at either side, as if each had its own."""
        sight, members = self.sights[choice], self._members[choice]
        cost = cost or sight.cost

        def sides(ports: Sequence[tuple[str, int]], whole: int, side: int) -> list[tuple[str | None, list[int]]]:
            found: list[tuple[str | None, list[int]]] = []
            for group, k in ports:
                widths, asked = sight.widths[group], None
                if block is None or block == members.inner.get(group):
                    asked = self._ask(choice, group, where)
                elif (port := self._ports[block][side]) is not None:
                    asked = self._ask("remove", port)
                found.append((asked, [units * k for units in widths]))
            units = sight.structure.units
            fixed = whole - sum(units[group] * k for group, k in ports)
            return found + ([(None, [fixed])] if fixed > 0 or not found else [])  # the rest has no channels

        outs = sides(layer.outputs, layer.cout, 1)
        if layer.kind == "depthwise":
            for asked, widths in outs:
                self._add([(asked, widths)], np.array([sign * cost(layer, w, w) for w in widths]), where)
            return
        for (a, before), (b, after) in itertools.product(sides(layer.inputs, layer.cin, 0), outs):
            table = np.array([[sign * cost(layer, cin, cout) for cout in after] for cin in before])
            if a == b and a is not None:
                self._add([(a, before)], table.diagonal(), where)
            else:
                self._add([(a, before), (b, after)], table, where)

    def _add(self, sides: Sequence[tuple[str | None, list[int]]], table: np.ndarray, where: tuple[Answer, ...]) -> None:
        table = table[tuple(slice(None) if asked is not None else 0 for asked, _ in sides)]
        asked = tuple(asked for asked, _ in sides if asked is not None)
        if asked or where:
            self._problem.terms.append(Term(asked, table, np.zeros_like(table), where))
        else:
            self._constant += float(table)
