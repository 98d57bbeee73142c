"""The program against every combination of answers, on random problems with all that a problem may hold."""

import itertools
import math

import numpy as np
import pytest

from rmprune.pruning.multiple_choice import Problem, Question, Term, solve


def random_problem(seed: int) -> Problem:
    """Two blocks of two choices, a width that is asked only where the first is 1, and two that are equal where the second is 0."""
    draw = np.random.default_rng(seed)
    questions = {"a": Question(2), "b": Question(2), "w": Question(3, (("a", 1),)), "u": Question(3), "v": Question(3)}

    def term(asked: tuple[str, ...], *where: tuple[str, int]) -> Term:
        shape = tuple(questions[name].count for name in asked)
        return Term(asked, draw.uniform(0.5, 2, shape), draw.uniform(0, 1, shape), where)

    terms = [term((), ("a", 1)), term((), ("b", 0)), term(("w", "u"), ("a", 1)), term(("u",))]
    terms += [term(("u", "v"), ("b", 1)), term(("v",), ("b", 0))]
    return Problem(questions, terms, [("u", "v", (("b", 0),))])


def by_hand(problem: Problem, answers: dict[str, int]) -> tuple[float, float] | None:
    """(cost, loss) of these answers; None where they may not be given together."""
    if any(answers[first] != answers[second] for first, second, ((q, a),) in problem.equal if answers[q] == a):
        return None
    held = [t for t in problem.terms if not t.where or any(answers[q] == a for q, a in t.where)]
    pairs = [(t.cost[at], t.loss[at]) for t in held for at in [tuple(answers[name] for name in t.questions)]]
    return math.fsum(float(cost) for cost, _ in pairs), math.fsum(float(loss) for _, loss in pairs)


@pytest.mark.parametrize("seed", range(4))
def test_no_answers_are_better(seed: int) -> None:
    problem = random_problem(seed)
    names = list(problem.questions)
    every = [dict(zip(names, answers, strict=True)) for answers in itertools.product((0, 1), (0, 1), *[range(3)] * 3)]
    scored = [(answers, found) for answers in every if (found := by_hand(problem, answers)) is not None]
    least = solve(problem, None)
    assert least is not None and least.cost == pytest.approx(min(cost for _, (cost, _) in scored))
    limit = float(np.median([cost for _, (cost, _) in scored]))
    found = solve(problem, limit)
    assert found is not None and found.cost <= limit + 1e-6
    assert found.loss == pytest.approx(min(loss for _, (cost, loss) in scored if cost <= limit), rel=2e-3)
    assert ("w" in found.answers) == (found.answers["a"] == 1)
    chosen = {name: found.answers[name] for name in "ab"}
    other = solve(problem, limit, other_than=[chosen])
    rest = [loss for answers, (cost, loss) in scored if cost <= limit and {n: answers[n] for n in "ab"} != chosen]
    assert (other is None) == (not rest) and (other is None or other.loss == pytest.approx(min(rest), rel=2e-3))
    near = solve(problem, limit, other_than=[chosen], near=(chosen, 1))
    assert near is None or sum(near.answers[name] != chosen[name] for name in "ab") == 1
    far = solve(problem, limit, other_than=[chosen], apart=2)
    rest = [loss for answers, (cost, loss) in scored if cost <= limit and all(answers[n] != chosen[n] for n in "ab")]
    assert (far is None) == (not rest) and (far is None or far.loss == pytest.approx(min(rest), rel=2e-3))
    assert solve(problem, 0.9 * least.cost) is None
