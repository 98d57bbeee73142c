"""Cells of a sweep share their training."""

from pathlib import Path

from rmprune.runs.cells import plan_cells


def test_cells_of_a_sweep_share_their_training() -> None:
    cells = plan_cells(Path("r"), 0, 2, [("macs_ratio", 0.5), ("macs_ratio", 0.25)])
    assert [str(cell.directory) for cell in cells] == [
        "r/seed0/macs_ratio-0.5", "r/seed0/macs_ratio-0.25", "r/seed1/macs_ratio-0.5", "r/seed1/macs_ratio-0.25",
    ]  # fmt: skip
    assert {str(cell.shared) for cell in cells} == {"r/seed0", "r/seed1"}
