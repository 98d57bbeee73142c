"""Peak memory counts what is held at once, from the present on."""

import subprocess
import sys

import pytest

import rmprune
from rmprune.measure import memory

PROGRAM = f"""
import runpy, sys, types
import numpy as np
sys.modules["rmprune"] = package = types.ModuleType("rmprune")  # without its imports: torch takes seconds
package.__path__ = {list(rmprune.__path__)!r}
PeakMemory = runpy.run_path({memory.__file__!r})["PeakMemory"]
before = np.ones((90, 2**17))  # 90 MiB that are gone again: no part of the peak
del before
with PeakMemory() as peak:
    for _ in range(3):
        held = np.ones((30, 2**17))
        del held
print(peak.mib)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count is Linux's")
def test_the_peak_is_what_was_held_at_once_since_the_start() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(30, abs=5)
