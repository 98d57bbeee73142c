"""The logs of the trainings of a run, as its record repeats them."""

import json
from pathlib import Path

from rmprune.runs.records import training_log


def test_the_logs_of_a_cell_and_of_what_it_shares_are_one(tmp_path: Path) -> None:
    shared, cell = tmp_path, tmp_path / "macs_ratio-0.5"
    cell.mkdir()
    for folder, label, epochs in ((shared, "dense", 2), (cell, "rm", 1)):
        lines = [{"label": label, "epoch": epoch + 1, "validation_accuracy": 0.5} for epoch in range(epochs)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dense = [{"epoch": 1, "validation_accuracy": 0.5}, {"epoch": 2, "validation_accuracy": 0.5}]
    assert training_log(shared, cell) == {"dense": dense, "rm": dense[:1]}
    assert training_log(shared, shared) == {"dense": dense}  # with one budget the cell is the run itself
    assert training_log(tmp_path / "nothing") == {}


def test_an_interrupted_log_is_read(tmp_path: Path) -> None:
    epochs = [{"label": "dense", "epoch": 1, "train_loss": 2.0}, {"label": "dense", "epoch": 1, "train_loss": 1.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs) + '{"label": "de')
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'\n\xff\xfe\n[]\n5\n{"label": "dense"}\n')
    assert training_log(tmp_path) == {"dense": [{"epoch": 1, "train_loss": 1.5}]}
