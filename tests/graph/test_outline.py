"""The outline of a network: layers in order with their widths, and where residuals are added."""

import json

import torch
from torch import Tensor, nn

from rmprune import models
from rmprune.graph.outline import outline


class Shortcut(nn.Module):
    """A strided block with a layer on its shortcut, and an identity block after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.main = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 1, stride=2)
        self.last = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.down(x) + self.inner(self.main(x).relu()))
        x = x.add(self.last(x))
        return self.fc(x.mean((2, 3)))


def test_layers_and_residuals() -> None:
    found = outline(Shortcut().eval(), torch.zeros(2, 3, 8, 6))
    assert [layer["name"] for layer in found["layers"]] == ["stem", "down", "main", "inner", "last", "fc"]
    assert found["layers"][2] == {
        "name": "main",
        "type": "Conv2d",
        "size": [4, 3],
        "cin": 4,
        "cout": 8,
        "groups": 2,
        "kernel": [3, 3],
        "stride": [2, 2],
    }
    assert found["layers"][5] == {"name": "fc", "type": "Linear", "size": [], "cin": 8, "cout": 5}
    assert found["residuals"] == [
        {"from": 0, "to": 3, "shortcut": [1]},
        {"from": 3, "to": 4, "shortcut": []},
    ]
    json.dumps(found)


def test_every_residual_of_a_network_is_found() -> None:
    found = outline(models.create("mobilenet_v2_digits", num_classes=10, in_channels=1).eval(), torch.zeros(1, 1, 8, 8))
    assert len(found["residuals"]) == 4 and all(r["to"] - r["from"] == 3 for r in found["residuals"])


class ByName(Shortcut):
    """Its layers are given their inputs by name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=self.stem(input=x).mean((2, 3)).repeat(1, 2))


def test_a_layer_may_be_called_by_the_names_of_its_arguments() -> None:
    assert [layer["size"] for layer in outline(ByName().eval(), torch.zeros(2, 3, 8, 6))["layers"]] == [[8, 6], []]
