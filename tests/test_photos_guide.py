"""docs/photos.md: its commands run, on a handful of photos and a narrow network."""

import csv
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import long
from PIL import Image

from rmprune import cli
from rmprune.artifact import weights
from rmprune.config.transfer import TRANSFER
from rmprune.methods import auto
from rmprune.models.families import create
from rmprune.runs.records import read_record

PAGE = Path(__file__).parents[1] / "docs" / "photos.md"
COMMANDS = re.findall(r"^python -m rmprune (.+)$", PAGE.read_text(), re.MULTILINE)
SMALL = {
    "inspect": "--width 2",
    "slim": "--width 2 --image-size 72 --epochs 1 --finetune.epochs 1 --batch-size 8 --workers 0 --round-to 1 --importance magnitude "
    "--no-reconstruct --measure.backend eager --measure.threads 1 --measure.batch-size 1 --measure.seconds 0 --measure.min-rounds 1",
}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """12 photos of each of two kinds, two of each object, and weights of a narrow network that knew 5 classes."""
    generator = np.random.default_rng(0)
    rows = []
    for kind, base in (("cracked", 60), ("whole", 160)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(base - 40, base + 40, (80, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{i}.png")
            rows.append({"image": f"{kind}/{i}.png", "label": kind, "part": f"{kind}{i // 2}"})
    with (tmp_path / "photos" / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    known = create("resnet18", num_classes=5, width=2).state_dict()
    torch.save({"model": known}, tmp_path / "weights.pt")
    monkeypatch.setattr(weights, "imagenet_weights", lambda name: known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [command if command.startswith("inspect") else long(command) for command in COMMANDS],
    ids=lambda command: " ".join(shlex.split(command)[-2:]),
)
def test_a_command_runs(
    command: str,
    photos: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", "rmprune")
    monkeypatch.setattr(auto, "PROPOSED", 1)  # its search is looked at in methods/
    monkeypatch.setattr(auto, "MINUTES", 0.0)
    monkeypatch.setattr(auto, "PRESETS", {name: auto.PRESETS[name] for name in ("residual", "rm")})
    words = shlex.split(f"{command} {SMALL[command.split()[0]]}".replace("--latency-ratio", "--macs-ratio"))
    cli.main(words)
    out = capsys.readouterr().out
    assert "the head is new: fc.weight is 5x16 there, 2x16 here" in caplog.text
    if words[0] == "inspect":
        assert "removable" in out
        return
    assert "cracked" in out and "AUC" in out and "decoding 24 images of 82x82 pixels, 0 MiB, once, into" in caplog.text
    (path,) = (photos / "runs").rglob("record.json")
    record: dict[str, Any] = read_record(path)
    assert record["normalization"]["mean"] == [0.485, 0.456, 0.406]
    assert record["config"]["data"]["augment"] == TRANSFER["data"]["augment"]
    for network in ("original", "pruned"):
        entry = record[network]
        assert [one["name"] for one in entry["classes"]] == ["cracked", "whole"]
        assert entry["balanced_accuracy"] == pytest.approx(sum(one["recall"] for one in entry["classes"]) / 2)
        assert 0 <= entry["auc"] <= 1
    assert (path.parent / "pruned" / "model.onnx").is_file()


def test_the_page_knows_the_defaults() -> None:
    text = PAGE.read_text()
    for stage, settings in TRANSFER.items():
        for name, value in settings.items():
            flag = f"--{'' if stage in ('data', 'train') else stage + '.'}{name.replace('_', '-')}"
            row = next(line for line in text.splitlines() if line.startswith("|") and flag in line)
            assert re.search(
                rf"\b{re.escape(f'{value:g}' if isinstance(value, float) else str(value))}\b", row.rsplit("|", 2)[1]
            ), flag
