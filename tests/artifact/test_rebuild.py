"""What a description may say is checked before anything is built."""

import json
from pathlib import Path

import pytest
from artifact_nets import net
from torch import nn

from rmprune.artifact.describe import describe
from rmprune.artifact.files import load, save
from rmprune.artifact.rebuild import build
from rmprune.errors import ArtifactError


def edit(description: dict, where: str, **values: object) -> dict:
    entry = next(e for e in description["nodes"] + description["layers"] if e["name"] == where)
    entry.update(values)
    return description


@pytest.mark.parametrize(
    ("where", "values", "words"),
    [
        ("stem.0", {"type": "os.system"}, "not a layer type"),
        ("stem.0", {"args": {"in_channels": 3}}, "not exactly"),
        ("stem.1", {"type": "ReLU", "args": {"inplace": 3}}, "out of range"),
        ("stem.0", {"name": "stem.0'); import os; ('"}, "not a valid name"),
        ("again", {"same_as": "nowhere"}, "no layer 'nowhere'"),
        ("relu", {"target": "os.system"}, "not a function"),
        ("view", {"target": "__class__"}, "not a tensor method"),
        ("mix", {"target": "absent"}, "no layer 'absent'"),
        ("mix", {"args": [{"node": "output"}]}, "not an earlier node"),
        ("mix", {"name": "x; import os"}, "not a usable name"),
        ("mix", {"op": "exec"}, "not an operation"),
        ("mix", {"kwargs": {"a b": 1}}, "no usable name"),
        ("cat", {"args": [{"set": [1]}]}, "not an argument"),
        ("x", {"target": "x, y=print(1)"}, "no usable name"),
    ],
)
def test_build_checks_everything(where: str, values: dict, words: str) -> None:
    description = json.loads(json.dumps(describe(net())))
    with pytest.raises(ArtifactError, match=words):
        build(edit(description, where, **values))


def test_huge_layers_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a")
    text = (path / "architecture.json").read_text()
    (path / "architecture.json").write_text(text.replace('"in_features": 4', '"in_features": 16000000'))
    with pytest.raises(ArtifactError, match="has shape"):
        load(path)
