"""Rounds of turns in one process: warm-up, timers, and which rounds count. It knows runs and clocks, no networks.

The first half of a turn is not counted: it brings back the caches that others have taken (`experiments/company.py`). Where other runs
come to count, tables of times on disk must know: `latency_model.TIMED`.
A round in which another process took a core from ours is left out and made up for: the kernel says how long our threads waited.
"""

import contextlib
import gc
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rmprune.measure.candidate import Run
from rmprune.measure.torch_backends import current

TURN_SECONDS = 0.005  # that count, and as many before that do not
WARMUP_SECONDS = 3.0  # at most
WARMUP_RUNS = 3
WINDOW_SECONDS = 0.02
SETTLED = 5  # windows in a row that are no faster than the fastest before them
FASTER = 0.98
DISTURBED = 0.02  # of a round: so long our threads may wait for others
AT_MOST_TIMES = 2  # times the seconds asked for, with rounds that were disturbed


class Rounds(NamedTuple):
    """Mean milliseconds of every turn that counts, by candidate and round; the runs in a turn of each; the rounds left out."""

    turns: dict[str, list[float]]
    repeats: dict[str, int]
    disturbed: int


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch's threads as asked; put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet_process(threads: int) -> Iterator[None]:
    """torch's threads as asked, no garbage collection; both put back."""
    collecting = gc.isenabled()
    with torch_threads(threads):
        gc.collect(1)  # all of it takes most of a second
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()


def timed_rounds(
    runs: Mapping[str, Run],
    device: str,
    seconds: float,
    min_rounds: int,
    order: random.Random,
    warmup: float = WARMUP_SECONDS,
    turn: float = TURN_SECONDS,
) -> Rounds:
    """Every candidate's turns, round by round, in each `turn` seconds that count; `warmup` seconds at most before. `seconds` for each
    candidate are spent on rounds that nothing disturbed, up to AT_MOST_TIMES times as many in all.
    """
    timer = _cuda_ms if device.startswith("cuda") else _cpu_ms
    turns: dict[str, list[float]] = {name: [] for name in runs}
    lasted: list[float] = []
    waited: list[float] = []
    spent, calm_seconds, calmest = 0.0, 0.0, math.inf
    names, budget = list(runs), seconds * len(runs)
    with current(device):
        repeats = {n: max(1, round(turn * 1e3 / max(_warm_up(runs[n], timer, warmup), 1e-3))) for n in names}
        while len(lasted) < min_rounds or (spent < AT_MOST_TIMES * budget and calm_seconds < budget):
            order.shuffle(names)
            start, before = time.perf_counter(), waiting_seconds()
            for name in names:
                for _ in range(repeats[name]):
                    runs[name]()
                turns[name].append(timer(runs[name], repeats[name]))
            waited.append(waited_between(before, waiting_seconds()))
            lasted.append(time.perf_counter() - start)
            spent += lasted[-1]
            share = waited[-1] / lasted[-1]
            if share < calmest:  # which rounds are calm goes by the calmest: all are counted anew, which is rare
                calmest, calm_seconds = share, sum(itertools.compress(lasted, calm(lasted, waited)))
            elif share <= calmest + DISTURBED:
                calm_seconds += lasted[-1]
    kept = least_disturbed(lasted, waited, min_rounds)
    return Rounds({name: [times[i] for i in kept] for name, times in turns.items()}, repeats, len(lasted) - len(kept))


def waiting_seconds() -> dict[str, float]:
    """How long each thread of this process has waited for a core that others had, by thread id (Linux, /proc/self/task/*/schedstat);
    none elsewhere.
    """
    found = {}
    with contextlib.suppress(OSError):
        for task in os.scandir("/proc/self/task"):
            with contextlib.suppress(OSError):  # a thread may end meanwhile
                found[task.name] = int(Path(task.path, "schedstat").read_bytes().split()[1]) / 1e9
    return found


def waited_between(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Seconds that threads waited from `before` to `after`: what a thread that ended has waited is not taken off."""
    return sum(max(0.0, wait - before.get(thread, 0.0)) for thread, wait in after.items())


def calm(lasted: Sequence[float], waited: Sequence[float]) -> list[bool]:
    """Of each round of so many seconds, whether threads waited in it no more than DISTURBED of it longer than in the calmest round:
    that much they wait for each other, where they are more than the cores.
    """
    shares = [wait / length for wait, length in zip(waited, lasted, strict=True)]
    limit = min(shares, default=0.0) + DISTURBED
    return [share <= limit for share in shares]


def least_disturbed(lasted: Sequence[float], waited: Sequence[float], least: int) -> list[int]:
    """Numbers of the rounds that count: the calm ones, or as many as `least` of those in which threads waited least.

    Rounds are chosen by what others took, never by the times measured in them, so the choice favours no candidate.
    """
    quiet = [i for i, fine in enumerate(calm(lasted, waited)) if fine]
    if len(quiet) >= least:
        return quiet
    return sorted(sorted(range(len(lasted)), key=lambda i: waited[i] / lasted[i])[:least])


def _warm_up(run: Run, timer: Callable[[Run, int], float], limit: float) -> float:
    """Runs until caches, allocators, clocks and just-in-time compilers have settled: until SETTLED windows of time in a row bring
    no run that is faster than the fastest so far, or for `limit` seconds. Returns the shortest time, in ms.

    The least time is watched, not the spread: other load cannot make a run faster, so a busy machine settles too.
    """
    end = time.perf_counter() + limit
    least, idle = min(timer(run, 1) for _ in range(WARMUP_RUNS)), 0
    while idle < SETTLED and time.perf_counter() < end:
        window, found = min(end, time.perf_counter() + WINDOW_SECONDS), [timer(run, 1)]
        while time.perf_counter() < window:
            found.append(timer(run, 1))
        idle = 0 if min(found) < FASTER * least else idle + 1
        least = min(least, *found)
    return least


def _cpu_ms(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) * 1e3 / repeats


def _cuda_ms(run: Run, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / repeats
