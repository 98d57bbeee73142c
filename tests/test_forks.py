"""Tests that train in forked processes, each file in a process of its own: autograd refuses to run in a fork of one where it has run."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "file", ["training/test_together.py", "training/test_distributed.py", "pipelines/test_grid.py"]
)
def test_those_that_fork(file: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-m",
        "forks",
        str(TESTS / file),
    ]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_file_that_forks_is_run() -> None:
    marked = {str(path.relative_to(TESTS)) for path in TESTS.glob("*/test_*.py") if "mark.forks" in path.read_text()}
    assert marked == {"training/test_together.py", "training/test_distributed.py", "pipelines/test_grid.py"}
