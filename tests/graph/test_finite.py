"""Values that are no numbers are refused with where they begin; odd numbers, sizes and formats work, or are one clear error."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rmprune
from rmprune.errors import RmpruneError, UnsupportedModel
from rmprune.graph.finite import broken_tensor
from rmprune.pruning import Budget

NAN, INF = float("nan"), float("inf")


class Small(nn.Module):
    """A residual block between a stem and a head."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((self.second(self.first(x).relu()) + x).relu().mean((2, 3)))


def network(dtype: torch.dtype = torch.float32, width: int = 2, **broken: float) -> nn.Module:
    """`broken`: {name of a tensor, dots written as __: its first value}."""
    torch.manual_seed(0)
    model = Small(width).eval().requires_grad_(False).to(dtype)
    for name, value in broken.items():
        model.state_dict()[name.replace("__", ".")].view(-1)[0] = value
    return model


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_complex_weights_are_refused() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.cfloat) for _ in range(2)))
    with pytest.raises(UnsupportedModel, match=r"0\.weight is complex"):
        rmprune.prune(net, torch.ones(1, 4, dtype=torch.cfloat), budget=Budget(ratio=0.5), importance="magnitude")


def test_weights_that_nothing_computes_with_are_refused() -> None:
    net = network()
    first = next(name for name, weight in net.named_parameters() if weight.dim() == 4)
    stored = net.get_parameter(first).to(torch.float8_e4m3fn)
    net.get_submodule(first.rpartition(".")[0]).weight = nn.Parameter(stored, requires_grad=False)
    for call in (rmprune.count_macs, rmprune.measure_latency):
        with pytest.raises(UnsupportedModel, match=f"{first}: float8_e4m3fn keeps numbers and computes with none"):
            call(net, images(2, 1, 8, 8))  # type: ignore[operator]


def test_a_network_without_finite_outputs_is_not_written(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    nn.init.constant_(net[1].running_var, -1.0)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match=r"the output of layer 1 \(BatchNorm2d\) is not finite"):
        rmprune.save(net, tmp_path / "net", example_inputs=images(2, 1, 8, 8))


def remove(model: nn.Module, x: Tensor) -> Tensor:
    return rmprune.remove_residuals(model, x).model(x)


def cut(model: nn.Module, x: Tensor) -> Tensor:
    """Of the same layers without the shortcut."""
    layers = [
        model.stem,
        model.norm,
        nn.ReLU(),
        model.first,
        nn.ReLU(),
        model.second,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return rmprune.prune(
        nn.Sequential(*layers, model.head).eval(), x, budget=Budget(ratio=0.5, round_to=1), importance="magnitude"
    )(x)


def collapse(model: nn.Module, x: Tensor) -> Tensor:
    return rmprune.collapse_blocks(model, x).model(x)


def save_and_load(model: nn.Module, x: Tensor) -> Tensor:
    return rmprune.load(rmprune.save(model, "net", overwrite=True))(x)


def count(model: nn.Module, x: Tensor) -> Tensor:
    assert rmprune.count_macs(model, x) > 0
    return model(x)


def measure(model: nn.Module, x: Tensor) -> Tensor:
    assert rmprune.measure_latency(model, x, backend="eager", threads=1, seconds=0, min_rounds=1).median_ms > 0
    return model(x)


EXACT = {"remove": remove, "save": save_and_load, "count": count, "measure": measure}
CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {**EXACT, "prune": cut, "collapse": collapse}
ODD = {
    "float64": (network(torch.float64), images(2, 1, 8, 8, dtype=torch.float64)),
    "float16": (network(torch.float16), images(2, 1, 8, 8, dtype=torch.float16)),
    "bfloat16": (network(torch.bfloat16), images(2, 1, 8, 8, dtype=torch.bfloat16)),
    "one channel": (network(width=1), images(2, 1, 8, 8)),
    "one odd image": (network(), images(1, 1, 7, 5)),
    "one pixel": (network(), images(2, 1, 1, 1)),
    "a column": (network(), images(1, 1, 500, 1)),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", ODD)
def test_odd_formats_and_sizes(case: str, call: str) -> None:
    """The outputs come in the format of the network, and are its own where the call promises that."""
    model, x = ODD[case]
    expected = model(x)
    if (case, call) == ("one channel", "prune"):
        with pytest.raises(rmprune.RmpruneError, match="even one channel a layer costs more"):
            CALLS[call](model, x)
        return
    found = CALLS[call](model, x)
    assert found.dtype == expected.dtype and found.shape == expected.shape and bool(found.isfinite().all())
    if call in EXACT:
        tolerance = 16 * torch.finfo(x.dtype).eps * (call == "remove")
        assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


BROKEN = {
    "NaN in a weight": (network(first__weight=NAN), images(2, 1, 8, 8), r"(first|3)\.weight is not finite"),
    "an infinite bias": (network(head__bias=-INF), images(2, 1, 8, 8), r"(head|8)\.bias is not finite"),
    "NaN in a statistic": (network(norm__running_mean=NAN), images(2, 1, 8, 8), r"(norm|1)\.running_mean is NaN"),
    "a variance below 0": (network(norm__running_var=-1), images(2, 1, 8, 8), r"the output of layer (norm|1) \(Batch"),
    "an infinite image": (network(), images(2, 1, 8, 8).index_fill(0, torch.tensor(1), INF), "example_inputs are not"),
    "whole numbers": (network(), torch.ones(2, 1, 8, 8, dtype=torch.uint8), "in float32, scaled as in training"),
    "no image": (network(), images(0, 1, 8, 8), "at least one example"),
    "no pixel": (network(), images(2, 1, 0, 8), "at least one example"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_values_are_refused_with_where_they_begin(case: str) -> None:
    model, x, words = BROKEN[case]
    for call in (remove, collapse, cut):
        with pytest.raises(UnsupportedModel, match=words):
            call(model, x)


def test_layers_without_channels_are_refused() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Conv2d(1, 0, 3), nn.Conv2d(0, 2, 1)).eval()
    for call in (
        rmprune.remove_residuals,
        rmprune.collapse_blocks,
        rmprune.count_macs,
        lambda model, _: rmprune.save(model, "net"),
    ):
        with pytest.raises(UnsupportedModel, match=r"layer 0 \(Conv2d\)"):
            call(model, images(1, 1, 4, 4))
    with pytest.raises(RmpruneError, match="backend 'eager' cannot run 'model'"):
        measure(model, images(1, 1, 4, 4))


def test_infinities_of_both_signs_in_a_mask_are_meant() -> None:
    net = network()
    net.register_buffer("mask", torch.tensor([INF, -INF]))
    assert broken_tensor(net) is None
    net.register_buffer("mask", torch.tensor([INF, NAN]))
    assert broken_tensor(net) == "mask is NaN" and broken_tensor(net, buffers=False) is None
