"""What a description may say is checked before anything is built."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from artifact_nets import net
from torch import Tensor, nn

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


def flat_with_a_dot(description: dict) -> None:
    description.update(kind="sequential")  # whose layers are named stem.0 and so on


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(layers=3), "no valid 'layers'"),
        (lambda d: d.update(kind="tree"), "of kind 'tree'"),
        (lambda d: d["nodes"].append({"op": "output"}), "an entry without a name"),
        (lambda d: d["tensors"].append({"name": "../x", "shape": [1], "dtype": "float32"}), "not a valid name"),
        (lambda d: d["tensors"].append({"name": "x", "shape": [-1], "dtype": "float32"}), "shape, type or kind"),
        (lambda d: d["tied"].append(["a"]), "pairs of names"),
        (lambda d: d["frozen"].append(3), "does not hold names"),
        (flat_with_a_dot, "a dot in its name"),
        (lambda d: d["nodes"].pop(), "does not end in an output"),
    ],
)
def test_a_description_that_is_no_network_is_refused(change: Callable[[dict], None], words: str) -> None:
    description = json.loads(json.dumps(describe(net())))
    change(description)
    with pytest.raises(ArtifactError, match=words):
        build(description)


class Arguments(nn.Module):
    """Every kind of argument that a node may have."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.softmax(x, 1, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        y = F.pad(y, (0, 1, 0, 1), value=float("inf")).clamp(max=9.0)
        return torch.cat([y[..., 1:], y[:, :, :, :-1]], dim=1)


def test_every_kind_of_argument_comes_back() -> None:
    model, x = Arguments(), torch.randn(2, 3, 4, 4)
    loaded = build(json.loads(json.dumps(describe(model), allow_nan=False)))
    assert torch.equal(loaded(x), model(x)) and loaded(x).dtype == torch.float64
