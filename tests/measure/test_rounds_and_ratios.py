"""How times are taken: warm-up until settled, first calls apart, intervals of ratios, a busy machine named."""

import itertools
import logging
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from rmprune.measure import latency as timing
from rmprune.measure import measure_latencies, results, rounds
from rmprune.measure.latency import KNOWN
from rmprune.measure.results import BUSY, Latency, median_interval, of_rounds
from rmprune.measure.rounds import WARMUP_RUNS, _warm_up, least_disturbed, timed_rounds, waited_between, waiting_seconds

X = torch.randn(1, 3, 12, 12)


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 100, 4)).eval()


WHERE = {"backend": "eager", "device": "cpu", "threads": 1, "batch_size": 4}


def of_times(times: list[float]) -> Latency:
    return of_rounds(times, 1, 0, **WHERE)


def test_warm_up_lasts_until_no_run_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = itertools.count(), []
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(clock) * 0.01)
    speeding_up = (
        max(1.0, 10 - 0.1 * n) + 0.2 * (n % 3) for n in itertools.count()
    )  # 90 runs till it has settled, and noise

    def timer(run: object, repeats: int) -> float:
        calls.append(next(speeding_up))
        return calls[-1]

    assert _warm_up(lambda: None, timer, 1000.0) == 1.0
    assert 90 < len(calls) < 130  # settled, noise or not
    calls.clear()
    steady = itertools.repeat(2.0)
    assert _warm_up(lambda: None, lambda run, repeats: calls.append(1) or next(steady), 1000.0) == 2.0
    assert WARMUP_RUNS < len(calls) < 30


def test_warm_up_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(clock) * 0.01)
    faster = (1.0 / (1 + n) for n in itertools.count())
    assert _warm_up(lambda: None, lambda run, repeats: next(faster), 2.0) > 0
    assert next(clock) < 400


def test_the_interval_of_a_ratio_holds_the_median_and_repeats_itself() -> None:
    draw = random.Random(0)
    drift = [1 + n / 20 for n in range(40)]  # the machine slows down to a third: both networks alike
    base = of_times([d * draw.uniform(0.99, 1.01) for d in drift])
    twice = of_times([2 * d * draw.uniform(0.99, 1.01) for d in drift]).relative_to(base)
    assert twice == of_times(list(twice.times_ms)).relative_to(base)
    assert twice.ratio_low is not None and twice.ratio is not None and twice.ratio_high is not None
    assert 1.97 < twice.ratio_low <= twice.ratio <= twice.ratio_high < 2.03
    assert twice.ratio_low < twice.ratio_high and {"ratio_low", "ratio_high"} <= twice.to_dict().keys()
    assert base.relative_to(base).ratio_low == base.relative_to(base).ratio_high == 1.0
    assert median_interval([3.0]) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("sittings", "apart", "alike", "before", "width"),
    [((100,), 0.0, 0.0, 45, 0.012), ((225,), 0.0, 0.9, 30, 0.022), ((45,) * 5, 0.02, 0.0, 30, 0.042)],
    ids=["independent", "rounds like those before them", "sittings apart"],
)
def test_intervals_hold_the_true_ratio_about_as_often_as_they_say(
    sittings: tuple[int, ...], apart: float, alike: float, before: int, width: float
) -> None:
    """Synthetic ratios around 1.7. As if all rounds were independent, two of the three intervals would claim far too much."""
    draw, count, held, claimed, wide = np.random.default_rng(0), sum(sittings), 0, 0, 0.0
    noise = draw.normal(0, 0.02, size=(50, count))
    for step in range(1, count):
        noise[:, step] = alike * noise[:, step - 1] + (1 - alike**2) ** 0.5 * noise[:, step]
    offsets = np.repeat(draw.normal(0, apart, size=(50, len(sittings))), sittings, axis=1)
    for values in 1.7 + offsets + noise:
        low, high = median_interval(list(values), sittings)
        middle = 1.253 * values.std() / count**0.5  # the standard error of a median of independent values
        held, wide = held + (low <= 1.7 <= high), wide + high - low
        claimed += abs(np.median(values) - 1.7) <= 1.96 * middle
    assert held >= 41 and wide / 50 < width  # and is no wider than it must be
    assert claimed >= before if before == 45 else claimed <= before


def in_two(first: float, second: float, rounds: int = 16) -> Latency:
    """Two sittings of these times."""
    return of_rounds([first] * rounds, 1, 0, **WHERE).followed_by(of_rounds([second] * rounds, 2, 3, **WHERE))


def test_sittings_are_put_together_and_their_disagreement_widens_the_interval() -> None:
    base, steady, moved = in_two(1.0, 1.0), in_two(2.0, 2.0), in_two(1.45, 1.62)
    assert (base.runs, base.rounds, base.sittings, base.disturbed) == (48, 32, (16, 16), 3)
    assert steady.relative_to(base).uncertainty == 0.0
    found = moved.relative_to(base)
    assert (found.ratio_low, found.ratio_high) == (1.45, 1.62) and found.uncertainty > KNOWN
    uneven = [1.1] * 3 + [1.0] * 37 + [1.1] * 3
    assert median_interval(uneven, (40, 3)) == (1.0, 1.1)  # all rounds of the long one, as in the ratio


def test_rounds_in_which_others_had_the_cores_are_left_out() -> None:
    lasted, waited = [1.0] * 8, [0.0, 0.3, 0.01, 0.0, 0.5, 0.0, 0.019, 0.021]
    assert least_disturbed(lasted, waited, 3) == [0, 2, 3, 5, 6]
    assert least_disturbed(lasted, [w + 0.4 for w in waited], 3) == [0, 2, 3, 5, 6]  # threads that wait for each other
    assert least_disturbed(lasted, waited, 7) == [0, 1, 2, 3, 5, 6, 7]  # too few are calm: those that waited least
    assert least_disturbed([10.0, 1.0, 1.0], [0.6, 0.5, 0.0], 2) == [0, 2]  # by the share of their time
    assert all(wait >= 0 for wait in waiting_seconds().values())
    assert waited_between({"1": 1.0, "ends": 0.5}, {"1": 1.25, "new": 0.125}) == 0.375


@pytest.mark.parametrize(("names", "rounds_of"), [("a", 0.03), ("ab", 0.05)])
def test_the_seconds_are_those_of_each_candidate(names: str, rounds_of: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn reads the clock twice, each round twice more."""
    clock = itertools.count()
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(clock) * 0.01)
    monkeypatch.setattr(rounds, "waiting_seconds", dict)
    found = timed_rounds({name: lambda: None for name in names}, "cpu", 0.35, 1, random.Random(0), warmup=0.0)
    assert len(found.turns["a"]) == math.ceil(0.35 * len(names) / rounds_of)


def test_rounds_that_were_disturbed_are_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second round, the first among them, waits for most of it; each turn reads the clock twice, each round twice more."""
    clock, waits = itertools.count(), itertools.count()
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(clock) * 0.01)
    monkeypatch.setattr(rounds, "waiting_seconds", lambda: {"1": ((next(waits) + 3) // 4) * 0.02})
    counted, calm = [], rounds.calm
    monkeypatch.setattr(rounds, "calm", lambda *those: counted.append(1) or calm(*those))
    found = timed_rounds({"a": lambda: None}, "cpu", 0.3, 2, random.Random(0), warmup=0.0)
    assert found.disturbed > 0 and 0.3 <= 0.03 * len(found.turns["a"]) < 0.4
    assert len(counted) == 3  # twice for a calmest round, and at the end; not before every round


@pytest.mark.parametrize(("moves", "unknown"), [({1, 3, 5, 7, 9}, 1), ({1}, 0)], ids=["never known", "after seven"])
def test_a_ratio_that_is_not_known_yet_gets_more_sittings(
    moves: set[int], unknown: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All of those more, and no interval is drawn more often than twice."""
    sat: list[str] = []
    drawn: list[int] = []

    def sitting(candidates: object, place: timing.Configuration, *rest: object) -> dict[str, Latency]:
        sat.append(place.backend)
        moved = 1.2 if place.backend == "eager" and sat.count("eager") in moves else 1.0
        return {"base": in_two(1.0, 1.0), "moving": of_rounds([moved] * 32, 1, 0, **WHERE)}

    monkeypatch.setattr(timing, "measure_configuration", sitting)
    monkeypatch.setattr(results, "median_interval", lambda *of: drawn.append(1) or median_interval(*of))
    one = {"threads": [1], "batch_sizes": [1], "device": "cpu", "min_rounds": 1, "reference": "base"}
    for seconds, expected in ((1.0, {"eager": 10, "onnxruntime": 5}), (0.1, {"eager": 1, "onnxruntime": 1})):
        sat.clear()
        timing.measure_candidates(
            {"base": None, "moving": None}, backends=["eager", "onnxruntime"], seconds=seconds, **one
        )  # type: ignore[dict-item]
        assert Counter(sat) == expected and sat[:2] == ["eager", "onnxruntime"]
    assert len(drawn) == 2 * (2 + 1) + 2 * (1 + 1)
    assert sum("1 of 4 ratios are not known within 3 %" in message for message in caplog.messages) == unknown


def test_images_per_second_and_spread() -> None:
    found = of_times([1.0, 2.0, 3.0])
    assert found.images_per_second == 2000 and found.spread == 0.5


def test_the_first_call_is_apart_from_the_rounds() -> None:
    found = measure_latencies(
        {"net": net(4)}, X, backends=["onnxruntime"], threads=[1], batch_sizes=[1], seconds=0.0, min_rounds=3
    )["net"][0]
    assert found.first_ms is not None and found.first_ms > found.median_ms  # a session was opened
    assert found.to_dict()["first_ms"] == found.first_ms and "peak_mib" not in found.to_dict()


@pytest.mark.parametrize(("spread", "said"), [(2.0, 1), (0.01, 0)])
def test_a_busy_machine_is_named(
    spread: float, said: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def pretended(runs: dict[str, object], *rest: object) -> rounds.Rounds:
        return rounds.Rounds({name: [1.0, 1.0 + spread, 1.0, 1.0 + spread] for name in runs}, dict.fromkeys(runs, 1), 0)

    monkeypatch.setattr(timing, "timed_rounds", pretended)
    caplog.set_level(logging.WARNING, logger="rmprune")
    measure_latencies({"a": net(2), "b": net(3)}, X, backends=["eager"], threads=[1], batch_sizes=[1, 2])
    assert [message.startswith("the machine was busy: 4 of 4 times") for message in caplog.messages] == [True] * said
    assert BUSY < 1


def test_a_time_does_not_depend_on_the_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run takes 1 ms; 2 ms while others had the caches, for the first four of a row."""
    now, row, last = 0.0, 0, ""
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now)

    def running(name: str) -> None:
        nonlocal now, row, last
        row, last = (row + 1 if last == name else 0), name
        now += 0.002 if row < 4 else 0.001

    runs = {name: (lambda name=name: running(name)) for name in ("a", "b", "c", "d")}
    found = timed_rounds(runs, "cpu", 0.5, 15, random.Random(0))  # type: ignore[arg-type]
    assert len(found.turns["a"]) >= 15
    assert all(time == pytest.approx(1.0) for own in found.turns.values() for time in own)


def test_networks_take_turns_after_the_warm_up() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}  # type: ignore[misc]
    turns, repeats, _ = timed_rounds(runs, "cpu", 0.0, 6, random.Random(1), warmup=0.0)
    assert len(turns["a"]) == len(turns["b"]) == 6 and min(repeats.values()) >= 1
    assert order[:3] == ["a"] * 3
