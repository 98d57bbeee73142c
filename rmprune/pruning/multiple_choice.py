"""One choice for each of several questions, at the least loss within a limit of cost: a mixed-integer program, solved by HiGHS.

It knows nothing of networks. A *question* has answers of which exactly one holds: what becomes of a block, how wide a group of channels
is. Some are asked only where another is answered in a certain way (the widths inside a block that stays). Cost and loss are sums over
*terms*, each a table over the answers to at most two questions, counted where its condition holds. The product of two answers is made
linear as in a transport problem: shares of each pair that add up to the answers, which is tight (Sherali and Adams 1990).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Answer = tuple[str, int]
"""(question, number of its answer)."""
GAP = 1e-2  # of the optimum: the surrogate is far from that exact
NODES = 2000  # of the search tree, at most: a limit by the clock would not find the same twice


@dataclass(frozen=True)
class Question:
    """Answers 0 ... count - 1; asked only where one of `where` holds, answers to one question (none: always)."""

    count: int
    where: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Term:
    """cost[a, b] and loss[a, b] where the two questions are answered a and b, and one of `where` holds; with fewer questions fewer axes."""

    questions: tuple[str, ...]
    cost: NDArray[np.float64]
    loss: NDArray[np.float64]
    where: tuple[Answer, ...] = ()


@dataclass
class Problem:
    """Questions and terms; `equal`: (question, question, where) that have the same answer where that holds; `needs`: an answer, and
    those of which one must hold with it."""

    questions: dict[str, Question] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)
    equal: list[tuple[str, str, tuple[Answer, ...]]] = field(default_factory=list)
    needs: list[tuple[Answer, tuple[Answer, ...]]] = field(default_factory=list)


@dataclass(frozen=True)
class Solution:
    """answers: {question that is asked: its answer}; predicted cost and loss."""

    answers: Mapping[str, int]
    cost: float
    loss: float


def solve(
    problem: Problem, limit: float | None, *, other_than: Iterable[Mapping[str, int]] = (), apart: int = 1,
    near: tuple[Mapping[str, int], int] | None = None,
) -> Solution | None:  # fmt: skip
    """The answers of the least loss whose cost is at most `limit` (None: of the least cost); None where there are none.

    other_than: each names answers of which `apart` at least do not hold; near: (answers, how many of them may be others). An answer that
    the question does not have never holds.
    """
    rows = _Rows(problem)
    for tabu in other_than:
        rows.add(rows.held(tabu), -np.inf, len(tabu) - apart)
    if near is not None:
        rows.add(rows.held(near[0]), len(near[0]) - near[1], np.inf)
    if limit is not None:
        if limit <= 0:
            return None
        rows.add([(at, cost / limit) for at, cost in enumerate(rows.cost)], -np.inf, 1.0)
    wanted = np.array(rows.cost if limit is None else rows.loss)
    found = milp(
        wanted / max(wanted.max(), 1e-12),
        constraints=rows.constraint(),
        integrality=np.array(rows.integral),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    if found.x is None:
        return None
    answers = {q: a for (q, a), at in rows.at.items() if found.x[at] > 0.5}
    return Solution(answers, float(found.x @ rows.cost), float(found.x @ rows.loss))


class _Rows:
    """The program's columns (answers, then shares of pairs) and rows."""

    def __init__(self, problem: Problem) -> None:
        self.at: dict[Answer, int] = {}
        self.cost: list[float] = []
        self.loss: list[float] = []
        self.integral: list[int] = []
        self._entries: list[tuple[int, int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []
        for name, question in problem.questions.items():
            for answer in range(question.count):
                self.at[name, answer] = self._column(0.0, 0.0, 1)
        for name, question in problem.questions.items():
            self._one([self.at[name, answer] for answer in range(question.count)], question.where)
        for term in problem.terms:
            self._term(term)
        for first, second, where in problem.equal:
            for answer in range(problem.questions[first].count):
                pair = [(self.at[first, answer], 1.0), (self.at[second, answer], -1.0)]
                slack = [(self.at[one], 1.0) for one in where]
                top = 1.0 if where else 0.0
                self.add(pair + slack, -np.inf, top)
                self.add([(at, -value) for at, value in pair] + slack, -np.inf, top)
        for needing, others in problem.needs:
            self.add([(self.at[needing], 1.0), *((self.at[other], -1.0) for other in others)], -np.inf, 0.0)

    def _column(self, cost: float, loss: float, integral: int) -> int:
        self.cost.append(cost)
        self.loss.append(loss)
        self.integral.append(integral)
        return len(self.cost) - 1

    def held(self, answers: Mapping[str, int]) -> list[tuple[int, float]]:
        """The entries that count how many of these hold."""
        return [(self.at[one], 1.0) for one in answers.items() if one in self.at]

    def add(self, entries: Sequence[tuple[int, float]], low: float, high: float) -> None:
        """low <= sum of value * column <= high."""
        self._entries += [(len(self._low), at, value) for at, value in entries if value]
        self._low.append(low)
        self._high.append(high)

    def _one(self, columns: Sequence[int], where: tuple[Answer, ...]) -> None:
        """They add up to 1, or to whether one of `where` holds."""
        asked = [(self.at[one], -1.0) for one in where]
        total = 0.0 if where else 1.0
        self.add([(at, 1.0) for at in columns] + asked, total, total)

    def _term(self, term: Term) -> None:
        if not term.questions and term.where:
            for one in term.where:
                self.cost[self.at[one]] += float(term.cost)
                self.loss[self.at[one]] += float(term.loss)
            return
        axes = [range(n) for n in term.cost.shape]
        share = {
            pair: self._column(float(term.cost[pair]), float(term.loss[pair]), 0) for pair in itertools.product(*axes)
        }
        self._one(list(share.values()), term.where)
        for axis, question in enumerate(term.questions):
            for answer in axes[axis]:
                own = [(at, 1.0) for pair, at in share.items() if pair[axis] == answer]
                self.add([*own, (self.at[question, answer], -1.0)], -np.inf, 0.0)

    def constraint(self) -> LinearConstraint:
        """All rows."""
        row, column, value = zip(*self._entries, strict=True)
        matrix = coo_array((value, (row, column)), shape=(len(self._low), len(self.cost)))
        return LinearConstraint(matrix.tocsc(), np.array(self._low), np.array(self._high))
