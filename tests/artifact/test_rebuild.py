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
from rmprune.errors import ArtifactError, UnsupportedModel
from rmprune.measure import activation_memory, measure_latency
from rmprune.pruning import Budget, prune
from rmprune.removal import remove_residuals


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


def node(op: str, name: str, target: str, *args: object, **kwargs: object) -> dict:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


@pytest.mark.parametrize(
    "read",
    [
        [{"node": "x"}, {"node": "T"}],  # a node of an allowed name, whose value is made as the graph runs
        [{"node": "x"}, "__class__"],
        [{"node": "x"}, ["T"]],
        ["x", "T"],
        [{"node": "x"}, "T", "T"],
        [{"node": "x"}],
        [],
    ],
)
def test_only_listed_attributes_are_read_by_names_that_stand_in_the_file(read: list[object]) -> None:
    nodes = [
        node("placeholder", "x", "x"),
        node("call_function", "T", "operator.add", "__cl", "ass__"),
        node("call_function", "y", "getattr", *read),
        node("output", "output", "output", {"node": "y"}),
    ]
    whole = {"kind": "graph", "training": False, "layers": [], "tensors": [], "tied": [], "frozen": [], "nodes": nodes}
    with pytest.raises(ArtifactError, match="may be read from a tensor"):
        build(whole)
    nodes[2]["args"] = [{"node": "x"}, "T"]
    assert build(whole)(torch.ones(2, 3)).shape == (3, 2)


def test_sizes_are_whole_numbers(tmp_path: Path) -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.one

    description = json.loads(json.dumps(describe(Free())))
    description["tensors"][0]["shape"] = [True]
    with pytest.raises(ArtifactError, match="shape, type or kind"):
        build(description)


class Heads(nn.Module):
    """Layers and a buffer by words of Python, at the top and below; or by what torch.fx calls its own."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Conv2d(8, 3, 1) for name in ("class", "in")})
        self.add_module("from", nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()))
        for name in ("global", *names):
            self.add_module(name, nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)))
        self.register_buffer("lambda", torch.full((1,), 0.5))
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        for name in ("global", *self.names):
            x = torch.relu(x + getattr(self, name)(x))
        x = getattr(self, "from")(x)
        return self.heads["class"](x) * getattr(self, "lambda") + self.heads["in"](x)


def test_layers_by_words_of_python(tmp_path: Path) -> None:
    model, x = Heads().eval(), torch.randn(2, 3, 6, 6)
    loaded = load(save(model, tmp_path / "a"))
    assert list(loaded.state_dict()) == list(model.state_dict()) and torch.equal(loaded(x), model(x))
    assert activation_memory(model, x).peak_bytes and measure_latency(model, x, seconds=0, min_rounds=3).median_ms
    plain = remove_residuals(model, x).model
    torch.testing.assert_close(load(save(plain, tmp_path / "b"))(x), model(x))
    smaller = prune(model, x, importance="magnitude", budget=Budget(ratio=0.2))
    assert torch.equal(load(save(smaller, tmp_path / "c"))(x), smaller(x))


@pytest.mark.parametrize("name", ["meta", "code", "graph", "recompile"])
def test_names_that_torch_fx_has_itself_are_one_line(name: str, tmp_path: Path) -> None:
    model, x = Heads(name).eval(), torch.randn(2, 3, 6, 6)
    for call in (lambda: save(model, tmp_path / "a"), lambda: activation_memory(model, x)):
        with pytest.raises(UnsupportedModel, match=f"torch.fx calls something of its own '{name}'; rename"):
            call()
    assert not (tmp_path / "a").exists()
    torch.testing.assert_close(remove_residuals(model, x).model(x), model(x))
    path = save(Heads("mine").eval(), tmp_path / "b")
    text = (path / "architecture.json").read_text()
    (path / "architecture.json").write_text(text.replace('"mine', f'"{name}'))
    with pytest.raises(ArtifactError):
        load(path)
