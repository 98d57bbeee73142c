"""Whole runs in miniature: networks are measured for their records alone, searches take few steps, and no artifact has an ONNX file."""

from collections.abc import Iterator
from functools import partial

import pytest

from rmprune.artifact import files
from rmprune.measure import place
from rmprune.methods import cutter
from rmprune.pipelines import stages


@pytest.fixture(scope="module", autouse=True)
def short_measuring() -> Iterator[None]:
    """6 networks in a search instead of 18, and 7 cuts of Torch-Pruning's instead of 14: measure/test_place.py and
    pruning/test_coupled.py look at the searches themselves. No times, no outlines and no ONNX files, which pipelines/ looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "CANDIDATES", 3)
        patch.setattr(place, "ROUNDS", 2)
        patch.setattr(cutter, "prune_coupled", partial(cutter.prune_coupled, attempts=7))
        patch.setattr(stages, "measure_latencies", lambda networks, *_, **__: {name: [] for name in networks})
        patch.setattr(stages, "outline", lambda *_: {})
        patch.setattr(files, "export_onnx", lambda *_: 0.0)
        yield
