"""A few kills of a real run; `python tests/kill.py --kills 50` does more, of every command."""

import kill
import pytest
from forked_workers import import_before_forks


@pytest.mark.long
@pytest.mark.forks
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(capsys: pytest.CaptureFixture[str]) -> None:
    """Once while it is trained, and twice at other moments."""
    import_before_forks()
    wrong = kill.rounds(3, 10, ["train"], "all", amids=("checkpoint", "", ""))
    said = capsys.readouterr().out
    assert not wrong and "3 kills in 1 runs, 0 of them wrong" in said, said
