"""What a run shows while it trains."""

import dataclasses
import sys
from pathlib import Path

import pytest
from training_nets import CONFIG, blobs, tiny_net

from rmprune.errors import ConfigError
from rmprune.training import fit


def test_tensorboard_needs_a_log_and_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = dataclasses.replace(CONFIG, tensorboard=True)
    with pytest.raises(ConfigError, match="log"):
        fit(tiny_net(), blobs(), config, seed=0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'rmprune\[all\]'"):
        fit(tiny_net(), blobs(), config, seed=0, log=tmp_path / "log.jsonl")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rmprune.training.journal._REFRESH_SECONDS", 0.0)
    fit(tiny_net(), blobs(), dataclasses.replace(CONFIG, epochs=1), seed=0, label="dense")
    shown = capsys.readouterr()
    assert "dense" in shown.err and "images/s" in shown.err and not shown.out
