"""Peak memory counts what is held at once, from the present on."""

import sys
from mmap import mmap

import numpy as np
import pytest

from rmprune.measure.memory import PeakMemory


def hold(mib: int) -> mmap:
    """Memory from the kernel, not from what the process had before."""
    held = mmap(-1, mib * 2**20)
    np.frombuffer(held, np.uint8)[:] = 1
    return held


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count is Linux's")
def test_the_peak_is_what_was_held_at_once_since_the_start() -> None:
    hold(90).close()  # gone again: no part of the peak
    with PeakMemory() as peak:
        for _ in range(3):
            hold(30).close()
    assert peak.mib == pytest.approx(30, abs=5)
