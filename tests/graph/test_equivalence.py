"""What two networks are compared by, and that a network which draws random numbers is refused as that."""

import dataclasses
import math
import random
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from removal_nets import basic, conv, images, prepared
from torch import Tensor, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.equivalence import own_rounding
from rmprune.graph.relative_error import Comparison, comparison_base, hardly_depends, relative_error
from rmprune.pruning import Budget, prune
from rmprune.pruning.collapse import collapse_blocks
from rmprune.removal import plan_removal, remove_residuals


def test_a_bias_on_the_output_does_not_count() -> None:
    original = torch.tensor([[0.0, 1.0], [2.0, 1.5], [40.0, 1.0]], dtype=torch.float64)
    wrong = original + torch.tensor([[0.0, 0.1], [0.0, 0.0], [0.0, 0.0]])
    base = torch.zeros(1, 2, dtype=torch.float64)
    assert relative_error(original, wrong, [2, 1], base) == pytest.approx(0.05)
    shifted = relative_error(original + 1e3, wrong + 1e3, [2, 1], base + 1e3)
    assert shifted == pytest.approx(0.05)


def test_each_group_of_images_and_each_output_has_its_own_measure() -> None:
    """A change of 0.1 counts where inputs change 1, beside images and outputs that change by 100."""
    small, large = torch.tensor([[0.0], [1.0], [100.0]], dtype=torch.float64), torch.full((3, 1), 100.0)
    base = (torch.zeros(1, 1), torch.zeros(1, 1))
    off = torch.tensor([[0.1], [0.0], [0.0]])
    assert relative_error((small, large), (small + off, large), [2, 1], base) == pytest.approx(0.1)
    assert relative_error((large, small), (large, small + off), [2, 1], base) == pytest.approx(0.1)
    assert relative_error((small, large), (small, large + off), [2, 1], base) == pytest.approx(0.001, rel=1e-4)


def test_without_anything_to_tell_an_image_from_the_largest_value_is_the_measure() -> None:
    one = torch.tensor([[4.0, -2.0]])
    assert relative_error(one, one + torch.tensor([[0.0, 1.0]]), [1]) == 0.25
    assert relative_error(torch.tensor(4.0), torch.tensor(5.0), [2, 1]) == 0.25
    assert relative_error(torch.zeros(2, 1), torch.zeros(2, 1), [2]) == 0.0
    assert relative_error(torch.zeros(2, 1), torch.ones(2, 1), [2]) == math.inf
    assert relative_error(torch.tensor([[math.inf], [1.0]]), torch.tensor([[math.inf], [1.5]]), [2]) == 0.5


def test_outputs_of_any_structure_are_compared() -> None:
    """A list with one tensor an image has no counterpart in `base`; a tensor without a batch has no images."""
    outputs, base = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 3.0])], [torch.zeros(2)]
    assert relative_error(outputs, [o + 1 for o in outputs], [1, 1], base) == pytest.approx(1.0)
    assert not hardly_depends(outputs, [1, 1], base)
    assert relative_error(torch.ones(7, 2), torch.ones(7, 2), [1, 1], torch.ones(7, 2)) == 0.0
    assert relative_error(outputs, outputs[:1], [1, 1], base) == math.inf


@dataclasses.dataclass
class Out:
    logits: Any
    loss: Any = None


class ModelOutput(OrderedDict[str, Any]):
    """As that of Hugging Face, of which torch's pytree knows nothing."""


class Listed(list[Any]):
    pass


@pytest.mark.parametrize("hold", [Out, lambda y: ModelOutput(logits=y), lambda y: Out([y]), lambda y: Listed([y, 1])])
def test_outputs_in_containers_that_torch_does_not_know_are_compared(hold: Callable[[Tensor], Any]) -> None:
    one = torch.tensor([[4.0, -2.0]])
    assert relative_error(hold(one), hold(one + 1), [1]) == 0.25


class Returns(nn.Module):
    def __init__(self, hold: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.block, self.head, self.hold = conv(3, 6), basic(), conv(6, 4), hold

    def forward(self, x: Tensor) -> Any:
        return self.hold(self.head(self.block(torch.relu(self.stem(x)))))


@pytest.mark.parametrize("hold", [Out, lambda y: ModelOutput(logits=y), lambda y: torch.complex(y.sin(), y)])
def test_removal_and_cut_of_such_networks_are_compared(hold: Callable[[Tensor], Any]) -> None:
    model = prepared(Returns(hold))
    assert 0 < remove_residuals(model, images()).max_error < 1e-12
    assert prune(model, images(), importance="magnitude", budget=Budget(ratio=0.5)).rmprune_facts["cut_error"] > 0


@pytest.mark.parametrize(
    ("hold", "said"),
    [
        (lambda y: {"out": types.SimpleNamespace(y=y)}, "a SimpleNamespace"),
        (lambda y: Out(types.SimpleNamespace(y=y)), "a SimpleNamespace"),
        (lambda _: [1, "two", None], "no tensor"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(hold: Callable[[Tensor], Any], said: str) -> None:
    model = prepared(Returns(hold))
    for call in (remove_residuals, lambda *given: prune(*given, importance="magnitude", budget=Budget(ratio=0.5))):
        with pytest.raises(UnsupportedModel, match=f"the network returns {said}"):
            call(model, images())


def test_both_parts_of_complex_outputs_are_compared() -> None:
    one = torch.tensor([[3.0 + 4.0j, -4.0j]])
    assert relative_error(one, one + 1j, [1]) == relative_error(one, one + 1, [1]) == 0.25
    assert relative_error(one.conj(), one.conj().resolve_conj(), [1]) == 0


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_what_is_not_finite_must_be_the_same(value: float) -> None:
    masked, open_ = torch.tensor([[value, 1.0, 2.0]]), torch.tensor([[0.5, 1.0, 2.0]])
    assert relative_error(masked, masked.clone(), [1]) == 0.0
    for pair in ((masked, open_), (open_, masked), (masked, masked.roll(1))):
        assert relative_error(*pair, [1]) == math.inf
    assert relative_error(torch.tensor([[math.inf, 1.0]]), torch.tensor([[-math.inf, 1.0]]), [1]) == math.inf


def test_outputs_that_hardly_depend_on_the_inputs_are_told() -> None:
    outputs, base = torch.randn(3, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    assert not hardly_depends(outputs + 1e6, [2, 1], base + 1e6)
    assert hardly_depends(outputs + 1e12, [2, 1], base + 1e12)
    assert hardly_depends(torch.zeros(3, 4), [2, 1], torch.zeros(1, 4))
    assert hardly_depends((outputs, torch.ones(3, 4)), [2, 1], (base, torch.ones(1, 4)))


def test_the_other_image_is_none_of_those_that_are_checked_and_inside_the_limits() -> None:
    (other,) = comparison_base((images(),), (-0.5, 0.25))
    assert other.shape == (1, 3, 8, 8) and other.dtype == torch.float64
    assert other.min() == -0.5 and other.max() == 0.25


class Written(nn.Module):
    """`function(self, x)`, as somebody might have written it in forward."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def network(function: Callable[[nn.Module, Tensor], Tensor] | nn.Module) -> nn.Module:
    torch.manual_seed(0)
    written = function if isinstance(function, nn.Module) else Written(function)
    return prepared(conv(3, 6), nn.ReLU(), written, basic(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


RANDOM = {
    "2.dropout: dropout .*training=self.training.*nn.Dropout": lambda m, x: F.dropout(x),
    "2.dropout: dropout .*training=self.training.*": lambda m, x: F.dropout(x, 0.3, True, True),
    "2.dropout: dropout .*training=self.training": lambda m, x: torch.dropout(x, 0.3, True),
    "2.dropout2d: .*training=self.training": lambda m, x: F.dropout2d(x),
    "2.alpha_dropout: .*training=self.training": lambda m, x: F.alpha_dropout(x, training=True),
    "2.feature_alpha_dropout: .*training=self.training": lambda m, x: F.feature_alpha_dropout(x, training=True),
    "2.rrelu: .*training=self.training": lambda m, x: F.rrelu(x, training=True),
    "2.rand_like: .*only if self.training": lambda m, x: x + torch.rand_like(x),
    "2.randn_like: .*only if self.training": lambda m, x: x * torch.randn_like(x),
    "2.bernoulli: .*only if self.training": lambda m, x: x * torch.bernoulli(torch.sigmoid(x)),
    "2.bernoulli_: .*stochastic_depth take": lambda m, x: torchvision.ops.stochastic_depth(x, 0.5, "row"),
    "2.normal_: normal draws": lambda m, x: x + torch.zeros_like(x).normal_(),
    "2: FractionalMaxPool2d": nn.FractionalMaxPool2d(2, output_size=4),
    "the network draws random .* if self.training": lambda m, x: x + torch.rand(6, 1, 1, dtype=torch.float64),
    "the network draws random .*buffer": lambda m, x: x * random.random(),
}


@pytest.mark.parametrize("said", RANDOM)
def test_what_is_random_in_eval_mode_is_named(said: str) -> None:
    model = network(RANDOM[said])
    for call in (remove_residuals, plan_removal, collapse_blocks):
        with pytest.raises(UnsupportedModel, match=f"^{said}"):
            call(model, images())


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.dropout(x, training=m.training),
        lambda m, x: F.rrelu(x),
        lambda m, x: torchvision.ops.stochastic_depth(x, 0.5, "row", training=m.training),
        lambda m, x: (torch.rand(3), torch.rand_like(x), x)[2],
    ],
    ids=["dropout", "rrelu", "stochastic_depth", "drawn for nothing"],
)
def test_what_is_random_in_training_alone_is_not_refused(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    assert remove_residuals(network(function), images()).removed == ["3"]


def test_random_numbers_of_a_generator_of_its_own_are_told_from_a_fault() -> None:
    """Nothing shows while the network is traced: only that it gives other outputs each time."""
    own = torch.Generator().manual_seed(0)
    model = network(lambda m, x: x + torch.rand(6, 1, 1, dtype=torch.float64, generator=own))
    with pytest.raises(UnsupportedModel, match="draws random numbers in eval mode"):
        remove_residuals(model, images())


def test_the_originals_own_rounding_is_also_that_of_its_statistics() -> None:
    norm = nn.BatchNorm2d(2, affine=False)
    model = nn.Sequential(nn.ReLU(), norm).double().eval()
    norm.running_mean.fill_(2.0**10)
    norm.running_var = torch.ones(1, dtype=torch.float64).expand(2)
    x, before = (torch.randn(3, 2, 4, 4, dtype=torch.float64),), norm.running_mean.clone()
    with torch.no_grad():
        assert 1e-14 < own_rounding(model, Comparison(x, [3], model(*x))) < 1e-11
    assert torch.equal(norm.running_mean, before)
