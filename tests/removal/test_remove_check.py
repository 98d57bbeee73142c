"""The check of `remove_residuals` can fail: under a large bias, in constant outputs, and in the dtype of the result (RM.md 10)."""

from collections.abc import Callable

import pytest
import torch
from removal_nets import basic, conv, conv_bn, images, prepared
from torch import Tensor, fx, nn

from rmprune.errors import NotEquivalent
from rmprune.graph import build
from rmprune.pruning.collapse import collapse_blocks
from rmprune.removal import remove_residuals


def classifier(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return prepared(
        *conv_bn(3, width), nn.ReLU(), basic(width), basic(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)
    )  # fmt: skip


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes every rewritten convolution wrong by so much."""
    original = build.build_conv

    def install(size: float) -> None:
        def faulty(data: build.Conv) -> nn.Conv2d:
            module = original(data)
            module.weight += size * data.rewritten
            return module

        monkeypatch.setattr(build, "build_conv", faulty)

    return install


@pytest.mark.parametrize(("bias", "size"), [(1e6, 1e-9), (1e12, 1e-3), (1e15, 1e-3)])
def test_a_fault_is_seen_below_a_large_final_bias(fault: Callable[[float], None], bias: float, size: float) -> None:
    model = classifier()
    model[-1].bias += bias
    removal = remove_residuals(model, images())
    assert removal.max_error < 1e-11 and ("hardly depend" in removal.note) == (bias > 1e9)
    fault(size)
    with pytest.raises(NotEquivalent, match=r"what the inputs change in the outputs.* a fault"):
        remove_residuals(model, images())


def test_constant_outputs_are_no_comparison_the_maps_before_the_head_are(fault: Callable[[float], None]) -> None:
    model = classifier()
    model[-1].weight.zero_()
    removal = remove_residuals(model, images())
    assert removal.note == "the outputs hardly depend on the inputs; compared as well: the maps _5"
    assert removal.facts["note"] == removal.note and removal.facts["max_error"] == removal.max_error > 0
    fault(1e-3)
    with pytest.raises(NotEquivalent, match=r"in the outputs and the maps _5, over the tolerance .* a fault"):
        remove_residuals(model, images())


def test_the_deepest_maps_that_depend_are_compared(fault: Callable[[float], None]) -> None:
    """The second block forgets its input: what comes after the first is compared."""
    model = classifier()
    model[4].branch[4].bias -= 1e6
    model[-1].weight.abs_()
    assert remove_residuals(model, images()).note.endswith("the maps _3_after")
    fault(1e-3)
    with pytest.raises(NotEquivalent, match=r"the maps _3_after"):
        remove_residuals(model, images())


def test_a_network_that_reads_nothing_is_said_to_be_compared_by_nothing() -> None:
    model = classifier()
    model[0].weight.zero_()
    assert remove_residuals(model, images()).note.endswith("compared as well: nothing")


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3, 8, 8), torch.ones(1, 3, 8, 8), 1e-9 * images()])
@pytest.mark.parametrize("ranges", ["provable", "calibrated"])
def test_examples_that_differ_in_nothing_do_not_blind_the_check(
    fault: Callable[[float], None], inputs: Tensor, ranges: str
) -> None:
    model = classifier()
    model[-1].bias += 1e6
    assert remove_residuals(model, inputs, ranges=ranges).note == ""
    fault(1e-7)
    with pytest.raises(NotEquivalent):
        remove_residuals(model, inputs, ranges=ranges)


def large(size: float) -> nn.Sequential:
    """Maps of about `size` between the first convolution and the head."""
    torch.manual_seed(0)
    model = prepared(conv(3, 6), nn.ReLU(), basic(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    for tensor in (model[0].weight, model[0].bias, model[2].branch[4].weight, model[2].branch[4].bias):
        tensor *= size
    model[2].branch[0].weight /= size
    model[5].weight /= size
    return model


LARGE = [(torch.float32, 1e20), (torch.float16, 1e3), (torch.bfloat16, 1e20), (torch.float32, 1e10)]


@pytest.mark.parametrize(("dtype", "size"), LARGE)
def test_large_values_come_out_right_in_the_dtype_of_the_model(dtype: torch.dtype, size: float) -> None:
    model, x = large(size).to(dtype), images().to(dtype)
    removal = remove_residuals(model, x)
    found, own = removal.model(x).double(), model(x).double()
    expected = model.double()(x.double())
    least = 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= 4 * (own - expected).abs().max() + least
    norms = [layer for layer in removal.model if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == (2 if size == 1e10 else 0)  # 1e10: deviations that float32 holds
    assert removal.own_dtype_error is not None and removal.facts["own_dtype_error"] == removal.own_dtype_error > 0


def test_variances_too_small_for_the_dtype_get_no_batch_norm_either() -> None:
    """Copies of maps of 2e-4: float16 holds them, not their variances of 4e-8, and an eps of 1e-12 covers nothing."""
    model = prepared(conv(3, 6), nn.ReLU(), basic())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12
    model[0].weight *= 2e-4
    for tensor in (model[0].bias, model[2].branch[4].weight, model[2].branch[4].bias):
        tensor.zero_()
    model, x = model.half(), images().half()
    removal = remove_residuals(model, x)
    expected = model.double()(x.double())
    assert (removal.model(x).double() - expected).abs().max() / expected.abs().max() < 0.01


@pytest.mark.parametrize(("dtype", "size"), LARGE[:3])
def test_a_result_that_is_wrong_in_its_own_dtype_alone_is_caught(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: float
) -> None:
    monkeypatch.setattr(build, "_holds", lambda *_: True)
    with pytest.raises(NotEquivalent, match=rf"in {dtype} the new network is off by .* the original itself by"):
        remove_residuals(large(size).to(dtype), images().to(dtype))


@fx.wrap
def wide_only(x: Tensor) -> Tensor:
    if x.dtype == torch.float16 and x.device.type == "cpu":
        raise NotImplementedError("\"wide_only_cpu\" not implemented for 'Half'")
    return x * 1


class WideOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return wide_only(x)


def test_what_the_cpu_cannot_run_in_the_dtype_is_said() -> None:
    model = prepared(conv(3, 6), nn.ReLU(), basic(), WideOnly()).half()
    removal = remove_residuals(model, images().half())
    assert removal.own_dtype_error is None
    assert removal.note.startswith("not compared in torch.float16 on cpu, where it does not run: ")


class HeadInDouble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = classifier()[:-1].float(), nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).double())


def test_layers_of_two_dtypes_are_no_network_that_does_not_run() -> None:
    model = HeadInDouble().eval()
    for call in (remove_residuals, collapse_blocks):
        with pytest.raises(NotEquivalent, match="layers are of several dtypes"):
            call(model, images().float())


def test_an_original_that_overflows_is_said() -> None:
    model = prepared(conv(3, 6), nn.ReLU(), basic(), gain=1e4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1e4)
    removal = remove_residuals(model.half(), images().half())
    assert (
        removal.own_dtype_error is None
        and removal.note == "not compared in torch.float16, where the outputs of the original itself are not finite"
    )
