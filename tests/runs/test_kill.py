"""A few kills of a real run; `python tests/kill.py --kills 50` does more, of every command."""

import kill
import pytest
from forked_workers import import_before_forks


@pytest.mark.forks
@pytest.mark.parametrize(("kills", "amid"), [(2, ""), (1, "checkpoint")])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    kills: int, amid: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import_before_forks()
    wrong = kill.rounds(kills, 10, ["train"], "all", amid=amid)
    said = capsys.readouterr().out
    assert not wrong and f"{kills} kills in 1 runs, 0 of them wrong" in said, said
