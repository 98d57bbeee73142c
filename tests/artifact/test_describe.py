"""Descriptions: JSON and back, the model left alone, and a closed list."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from artifact_nets import flat, net
from torch import Tensor, nn

from rmprune.artifact.describe import describe
from rmprune.artifact.files import save
from rmprune.artifact.rebuild import build
from rmprune.errors import UnsupportedModel


def test_describe_is_json_and_build_reads_it_back() -> None:
    for model in (flat(), net()):
        description = json.loads(json.dumps(describe(model), allow_nan=False))
        assert describe(build(description)) == description


def test_describe_leaves_the_model_alone() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    keys = set(model.__dict__)
    describe(model)
    assert set(model.__dict__) == keys
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class MyConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.erfinv(super().forward(input))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_hook(lambda m, i, o: o * 2)
    return model


def surgically_damaged() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model[0].weight = nn.Parameter(torch.zeros(2, 3, 1, 1))
    return model


def hooked_outside() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    model.register_forward_hook(lambda _, __, y: 2 * y)
    return model


def replaced() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    model[0].forward = lambda x: x
    return model


def changed() -> nn.Module:
    model = nn.Sequential(nn.ReLU6())
    model[0].max_val = 0.5
    return model


class Unseen(nn.Module):
    """What torch.fx reads of these is another network."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * len(x) if self.how == "len" else torch.stack([y[0], y[-1] * len(y)])


@pytest.mark.parametrize("how", ["len", "pieces"])
def test_what_holds_for_one_number_of_images_is_refused(how: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="asks for the number of images"):
        save(Unseen(how).eval(), tmp_path / "a", example_inputs=torch.randn(3, 3, 4, 4))
    assert list(tmp_path.iterdir()) == []


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Odd(), "fft"),
        (Branching(), "control flow"),
        (nn.Sequential(MyConv(3, 3, 1)), "erfinv"),
        (hooked(), "hooks"),
        (hooked_outside(), "Sequential: it carries hooks"),
        (replaced(), "its forward was replaced"),
        (changed(), "its max_val is 0.5, where one made anew has 6.0"),
        (surgically_damaged(), "do not fit"),
        (Functional().train(), "training mode"),
        (nn.LSTM(3, 3), "trace"),
    ],
)
def test_outside_the_closed_list_is_refused_by_name(model: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
