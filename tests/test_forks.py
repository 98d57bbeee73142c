"""Tests that train in forked processes, in a process of their own: autograd refuses to run in a fork of one where it has run."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.long
def test_those_that_fork() -> None:
    files = [str(path) for path in sorted(TESTS.glob("*/test_*.py")) if "mark.forks" in path.read_text()]
    assert files
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-m", "forks", *files]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-3000:]
