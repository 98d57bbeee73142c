"""One thread in each process: the suite runs in two of them side by side, and what its tests start inherits this."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from marks import left_out

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # where a shell started the tests in the background, Ctrl-C is ignored
gc.disable()  # while the suite is imported
settings.register_profile("fixed", derandomize=True, deadline=None)  # the same draws every time
settings.load_profile("fixed")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A second thread that a test leaves behind spins on a core the other process needs: all tests after it take many times as long."""
    if "torch" in sys.modules and (left := sys.modules["torch"].get_num_threads()) != 1:
        sys.modules["torch"].set_num_threads(1)
        pytest.fail(f"{item.nodeid} left torch with {left} threads")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests are skipped where nobody asked for them, and tests that fork where others run in other files, too."""
    for item in left_out(items):
        item.add_marker(
            pytest.mark.skip(reason="long: RMPRUNE_ALL_TESTS=1 runs all tests, and a file that is run alone its own")
        )
    forks = [item for item in items if item.get_closest_marker("forks") is not None]
    if len(forks) < len(items) and len({item.path for item in items}) > 1:
        for item in forks:
            item.add_marker(
                pytest.mark.skip(reason="forks: tests/test_forks.py runs those that do in a process of their own")
            )


def pytest_collection_finish() -> None:
    """What the imports made stays: every full collection, and each measurement of a time begins with one, passes it by."""
    pass_by()
    gc.set_threshold(50_000, 10, 20)
    gc.enable()


def pass_by() -> None:
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need a GPU are skipped where there is none."""
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")


@pytest.fixture(scope="module", autouse=True)
def late_imports_stay() -> Iterator[None]:
    yield
    pass_by()


@pytest.fixture(scope="module", autouse=True)
def nothing_waits_for_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """No power cut is looked at, except where writing itself is."""
    with pytest.MonkeyPatch.context() as patch:
        if "runs" not in request.path.parts:
            patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_warm_up(request: pytest.FixtureRequest) -> Iterator[None]:
    """Networks are measured without a warm-up and in turns of a run or two, except where measuring itself is looked at."""
    if "measure" in request.path.parts:
        yield
        return
    from rmprune.measure import latency

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "timed_rounds", partial(latency.timed_rounds, warmup=0.0, turn=0.0))
        yield


@pytest.fixture(scope="module", autouse=True)
def rough_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs draw their figures coarsely and once, except where reports themselves are looked at."""
    if "report" in request.path.parts:
        yield
        return
    from matplotlib.figure import Figure

    savefig = Figure.savefig

    @wraps(savefig)
    def rough(figure: Figure, file: Path, **settings: Any) -> None:
        if settings.get("format") == "svg":
            file.write_text("<svg/>")
        else:
            savefig(figure, file, **settings | {"dpi": 20})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", rough)
        yield
