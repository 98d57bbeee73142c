"""Networks whose code names a dtype or a device: the proof is in float64, the result keeps the code as it is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import rmprune
from rmprune.errors import UnsupportedModel

KERNEL = torch.rand(4, 4, 1, 1)


class _Norm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class _Net(nn.Module):
    """A convolution, a residual, `what` between it and the head."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.branch, self.norm, self.head = (
            nn.Conv2d(1, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), _Norm(2, 4), nn.Linear(4, 2)
        )  # fmt: skip
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        return self.head(self.what(F.relu(y + self.branch(y))).mean((2, 3)).float())


CASTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether a file can hold it
    "float": (lambda y: y.double().float(), True),
    "to": (lambda y: y.to(torch.float32), True),
    "dtype": (lambda y: F.softmax(y, -1, dtype=torch.float32), True),
    "zeros": (lambda y: y + torch.zeros(y.shape[0], 1, 1, 1), True),
    "device": (lambda y: y + torch.ones(y.shape[0], 1, 1, 1, device="cpu", dtype=torch.float32), True),
    "full": (lambda y: y + torch.full((y.size(0), 1, 1, 1), 0.3), True),
    "constant": (lambda y: F.conv2d(y, torch.full((4, 4, 1, 1), 0.3)), False),
    "global": (lambda y: F.conv2d(y, KERNEL), False),
}


@pytest.mark.parametrize("name", CASTS)
def test_what_is_cast_to_its_own_dtype_is_proved_in_float64(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    what, kept = CASTS[name]
    net, x = _Net(what).eval(), torch.randn(3, 1, 4, 4)
    removal = rmprune.remove_residuals(net, x)
    assert removal.max_error < 1e-12
    assert removal.own_dtype_error is not None  # it runs in float32
    pruned = rmprune.prune(net, x, importance="random", budget=rmprune.Budget(ratio=0.7))
    assert pruned.rmprune_facts["cut_error"] < 1e-12  # type: ignore[index, union-attr]
    assert rmprune.collapse_blocks(net, x).model(x).dtype == torch.float32
    for k, result in enumerate((removal.model, pruned)):
        assert {p.dtype for p in result.parameters()} == {torch.float32}
        if kept:
            rmprune.save(result, tmp_path / str(k))
            assert torch.equal(rmprune.load(tmp_path / str(k))(x), result(x))


def test_tensors_made_on_the_way_after_a_network_whose_sizes_decide() -> None:
    """As in a new process: torch notes at the first use of a device which functions make tensors."""
    _device_constructors.cache_clear()
    try:
        for what in (lambda y: y * 2 if y.shape[2] > 1 else y, CASTS["zeros"][0]):
            assert rmprune.remove_residuals(_Net(what).eval(), torch.randn(2, 1, 4, 4)).max_error < 1e-12
    finally:
        _device_constructors.cache_clear()


def test_a_norm_that_casts_inside() -> None:
    net, x = _Net(nn.Identity()).eval(), torch.randn(3, 1, 4, 4)
    net.what = net.norm
    assert rmprune.remove_residuals(net, x).max_error < 1e-12


@pytest.mark.parametrize("call", ["remove_residuals", "collapse_blocks"])
def test_half_precision_inside_is_refused(call: str) -> None:
    net = _Net(lambda y: y.half().to(y.dtype)).eval()
    with pytest.raises(UnsupportedModel, match=r"computes in float16 inside \(half\)"):
        getattr(rmprune, call)(net, torch.randn(2, 1, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_cut_network_that_never_ran_in_its_own_dtype_is_one_error(dtype: torch.dtype) -> None:
    net = _Net(lambda y: y).eval().to(dtype)  # its head reads float32
    with pytest.raises(UnsupportedModel, match=f"the network itself does not run in {dtype}"):
        rmprune.prune(net, torch.randn(3, 1, 4, 4), importance="random", budget=rmprune.Budget(ratio=0.5))


def test_code_that_insists_on_a_dtype_is_one_error() -> None:
    class Insists(_Net):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return super().forward(x)

    for call in (
        rmprune.remove_residuals,
        lambda net, x: rmprune.prune(net, x, importance="random", budget=rmprune.Budget(ratio=0.5)),
    ):
        with pytest.raises(UnsupportedModel, match=r"does not run in float64 \(AssertionError.*name no dtype"):
            call(Insists(lambda y: y).eval(), torch.randn(3, 1, 4, 4))
