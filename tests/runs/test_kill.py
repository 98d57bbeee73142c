"""A few kills of a real run; `python tests/kill.py --kills 50` does more, of every command."""

import subprocess
import sys
from pathlib import Path

KILL = Path(__file__).parents[1] / "kill.py"


def test_a_run_that_was_killed_ends_as_if_it_had_not_been() -> None:
    command = [sys.executable, KILL, "--kills", "2", "--seed", "10", "--commands", "train", "--fork", "all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills in 1 runs, 0 of them wrong" in done.stdout
