"""MACs and parameters against figures known from elsewhere and counted by hand."""

import time

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from rmprune.measure.cost import count_macs, count_params


@pytest.mark.parametrize(
    ("name", "gmacs", "params"),
    [("resnet18", 1.814, 11_689_512), ("mobilenet_v2", 0.3008, 3_504_872), ("densenet121", 2.834, 7_978_856)],
)
def test_known_figures(name: str, gmacs: float, params: int) -> None:
    model = torchvision.models.get_model(name, weights=None)
    assert count_macs(model, torch.zeros(2, 3, 224, 224)) / 1e9 == pytest.approx(gmacs, rel=2e-3)
    assert count_params(model) == params


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, padding=1, groups=2).flatten(2)
        return self.head(torch.matmul(y, y.transpose(1, 2)))


def test_functional_calls_count_too() -> None:
    x = torch.zeros(3, 4, 5, 5)
    assert count_macs(Functional(), x) == 6 * 2 * 9 * 25 + 6 * 6 * 25 + 6 * 6 * 5


class Vectors(nn.Module):
    """A bilinear layer, products of matrices and vectors in every spelling, and one summed over matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.weight = nn.Bilinear(3, 4, 5), nn.Parameter(torch.zeros(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        v = x.mean(0)
        rows = x @ self.weight[0] + torch.mv(x, v) + torch.addmv(x[:, 0], x, v) + torch.dot(v, v)
        pairs = torch.addbmm(x[:, :1], x[None].expand(2, -1, -1), v.view(1, 3, 1).expand(2, -1, -1))
        return self.bilinear(x, x[:, [0, 1, 2, 0]]).sum(1) + rows + pairs[:, 0]


def test_products_with_vectors_count() -> None:
    assert count_macs(Vectors(), torch.zeros(2, 3)) == 3 + 3 + 3 + 3 + 2 * 3 + 3 * 4 * 5


def test_a_network_that_makes_tensors_is_run_for_real() -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + torch.ones(4, 1, 1)

    assert count_macs(Made(), torch.zeros(1, 3, 2, 2)) == 3 * 4 * 4


def test_counting_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = model[1].running_mean.clone()
    count_macs(model, torch.randn(2, 3, 4, 4))
    assert model.training and model[1].training and torch.equal(model[1].running_mean, before)


def test_shared_parameters_count_once() -> None:
    conv = nn.Conv2d(4, 4, 1)
    assert count_params(nn.Sequential(conv, conv)) == 20


@pytest.mark.long
def test_a_thousand_layers_are_quick() -> None:
    layers = [m for _ in range(1200) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    start = time.process_time()
    assert count_macs(nn.Sequential(*layers), torch.zeros(1, 8, 8, 8)) == 1200 * 8 * 8 * 9 * 64
    assert time.process_time() - start < 10


class Mixing(nn.Module):
    """Layers that CPUs run as one operator each; with a tensor made on the fly, the network is run for real."""

    def __init__(self, kind: str, made: bool) -> None:
        super().__init__()
        self.kind, self.made = kind, made
        self.layer: nn.Module = {
            "lstm": lambda: nn.LSTM(16, 16, batch_first=True),
            "gru": lambda: nn.GRU(16, 16, batch_first=True),
            "attention": lambda: nn.MultiheadAttention(16, 2, batch_first=True),
            "encoder": lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
            "product": lambda: nn.Linear(16, 48),
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        if self.made:
            x = x + torch.arange(x.shape[1])[:, None]
        if self.kind == "product":
            return F.scaled_dot_product_attention(*self.layer(x)[:, None].chunk(3, -1))
        found = self.layer(*(3 * (x,) if self.kind == "attention" else (x,)))
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("kind", ["lstm", "gru", "attention", "encoder", "product"])
def test_layers_of_several_operators_count_the_same_when_run_for_real(kind: str) -> None:
    x = torch.randn(2, 6, 16)
    before = torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
    found = [count_macs(Mixing(kind, made).eval(), x) for made in (False, True)]
    projections = {"lstm": 2 * 4, "gru": 2 * 3, "attention": 4, "encoder": 4 + 2 * 2, "product": 3}[kind] * 6 * 16 * 16
    products = 0 if kind in ("lstm", "gru") else 2 * 6 * 6 * 16
    assert found == [projections + products] * 2
    assert (torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()) == before
