"""How times are taken: warm-up until settled, first calls apart, intervals of ratios, a busy machine named."""

import itertools
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn

from rmprune.measure import latency as timing
from rmprune.measure import measure_latencies
from rmprune.measure.latency import WARMUP_RUNS, _warm_up, timed_rounds
from rmprune.measure.results import BUSY, Latency, median_interval

X = torch.randn(1, 3, 12, 12)


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 100, 4)).eval()


def of_times(times: list[float]) -> Latency:
    q1, median, q3 = np.quantile(times, [0.25, 0.5, 0.75])
    return Latency("eager", "cpu", 1, 4, median, q1, q3, len(times), len(times), times_ms=tuple(times))


def test_warm_up_lasts_until_no_run_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = itertools.count(), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) * 0.01)
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
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) * 0.01)
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


def test_intervals_hold_the_true_median_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(5.0, 1.0, size=(200, 25))
    inside = sum(low <= 5.0 <= high for low, high in (median_interval(list(row)) for row in draws))
    assert 180 <= inside <= 200


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
    def rounds(runs: dict[str, object], *rest: object) -> tuple[dict[str, list[float]], dict[str, int]]:
        return {name: [1.0, 1.0 + spread, 1.0, 1.0 + spread] for name in runs}, dict.fromkeys(runs, 1)

    monkeypatch.setattr(timing, "timed_rounds", rounds)
    caplog.set_level(logging.WARNING, logger="rmprune")
    measure_latencies({"a": net(2), "b": net(3)}, X, backends=["eager"], threads=[1], batch_sizes=[1, 2])
    assert [message.startswith("the machine was busy: 4 of 4 times") for message in caplog.messages] == [True] * said
    assert BUSY < 1


def test_networks_take_turns_after_the_warm_up() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}  # type: ignore[misc]
    turns, repeats = timed_rounds(runs, "cpu", 0.0, 6, random.Random(1), warmup=0.0)
    assert len(turns["a"]) == len(turns["b"]) == 6 and min(repeats.values()) >= 1
    assert order[:3] == ["a"] * 3
