"""The page says what the command computes."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_holds_both_tables() -> None:
    rows = runpy.run_path(str(ROOT / "experiments" / "study_scale.py"))["tables"](25_557_032, 82.0, 607.0)
    page = (ROOT / "docs" / "beyond-one-machine.md").read_text().splitlines()
    assert [row for row in rows if row not in page] == []
