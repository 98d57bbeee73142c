"""What was measured once is remembered."""

from pathlib import Path

import pytest

from rmprune.errors import ArtifactError
from rmprune.runs.notes import remembered


def test_what_was_measured_once_is_remembered(tmp_path: Path) -> None:
    values, file = iter((0.5, {"width": 0.25}, 0.125)), tmp_path / "c" / "m.json"
    for _ in range(2):
        assert [remembered(file, key, lambda: next(values)) for key in ("a", "b")] == [0.5, {"width": 0.25}]
    for damaged in ("[0.5]", '{"a": '):
        file.write_text(damaged)
        with pytest.raises(ArtifactError, match=r"m\.json: damaged"):
            remembered(file, "a", lambda: next(values))
        assert file.read_text() == damaged
