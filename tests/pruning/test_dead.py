"""Dead channels go exactly: constants folded, borders counted, unread ones followed upstream, to a fixpoint; float64."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import draws
from pruning_nets import Untraceable, chain, conv, images, kill, randomise, residual
from torch import nn

from rmprune.errors import NotEquivalent, UnsupportedModel
from rmprune.pruning import dead, prune
from rmprune.pruning.budget import Budget
from rmprune.pruning.constants import response
from rmprune.pruning.dead import fold_dead_channels
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.layers import weight_of


def assert_equal(model: nn.Module, folded: nn.Module, tolerance: float = 1e-12) -> None:
    x = images(3, seed=5)
    with torch.no_grad():
        before, after = model(x), folded(x)
    assert float((after - before).abs().max() / before.abs().max()) < tolerance


def widths(model: nn.Module) -> dict[str, int]:
    return find_structure(model, images()).units


@pytest.mark.parametrize("kernel", [1, 3])
def test_unpadded_constants_fold_into_the_next_layer(kernel: int) -> None:
    model = chain(kernel=kernel, padding=0)
    kill(model, "1", [1, 4, 5], 0.7)
    kill(model, "4", [0, 11], -0.7)
    kill(model, "7", [3], 0.3)  # read by the linear layer, behind the pool
    folded = fold_dead_channels(model, images())
    assert widths(folded) == {"0": 5, "3": 10, "6": 15}
    assert_equal(model, folded)
    naive = fold_dead_channels(model, images())
    naive[4].running_mean.copy_(model[4].running_mean[[i for i in range(12) if i not in (0, 11)]])
    with torch.no_grad():
        error = float((naive(images()) - model(images())).abs().max())
    assert error > 1e-3  # without folding it is not the same


def test_padded_constants_count_the_border() -> None:
    """Channels that are constant but not 0 merge into one of them, for they all have the same border; zeros just go."""
    model = chain()
    kill(model, "1", [0, 2, 3, 6], 0.7)
    model[1].bias.data[2], model[1].bias.data[6] = 1.1, 0.4
    kill(model, "4", [1, 2, 5], -0.5)  # relu(-0.5) = 0
    folded = fold_dead_channels(model, images())
    assert widths(folded) == {"0": 5, "3": 9, "6": 16}
    assert_equal(model, folded)


def test_a_fold_that_is_wrong_by_little_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead, "response", lambda layer, values: (1 + 1e-4) * response(layer, values))
    model = chain(padding=0)
    kill(model, "1", [1, 4, 5], 0.7)
    with pytest.raises(NotEquivalent, match="folding dead channels changed the outputs"):
        fold_dead_channels(model.float(), images().float())


@pytest.mark.parametrize("stride", [1, 2])
def test_constants_before_padding_that_a_forward_does_itself(stride: int) -> None:
    """timm's Conv2dSame says that it pads by nothing. The mistake was below what a check in float32 saw."""
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    same = Conv2dSame(8, 8, 3, stride, bias=False)
    model = randomise(
        nn.Sequential(
            conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), same, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 5),
        )
    ).eval()  # fmt: skip
    kill(model, "1", [1, 4, 5], 0.02)
    model[1].bias.data[4] = 0.01
    folded = fold_dead_channels(model, images().float())
    assert widths(folded.double())["0"] == 6 and widths(model.double())["0"] == 8
    assert_equal(model, folded, 1e-6)


def test_one_padded_constant_stays() -> None:
    model = chain()
    kill(model, "1", [3], 0.7)
    assert widths(fold_dead_channels(model, images()))["0"] == 8


def test_unread_channels_die_upstream() -> None:
    model = chain()
    kill(model, "4", [0, 1, 2], -1.0)
    weight_of(model, "6").data[:, 7] = 0  # nobody reads channel 7 of layer 3
    weight_of(model, "3").data[4:, 6] = 0  # channel 6 of layer 0 is read by 0..3 only, which go with
    weight_of(model, "6").data[:, 3] = 0
    folded = fold_dead_channels(model, images())
    assert widths(folded) == {"0": 7, "3": 7, "6": 16}
    assert_equal(model, folded)


def test_constants_die_downstream() -> None:
    """A channel computed from constants alone is constant; without padding it folds on."""
    model = chain(kernel=1)
    kill(model, "1", [0, 1, 2], 0.4)
    weight_of(model, "3").data[5, 3:] = 0
    folded = fold_dead_channels(model, images())
    assert widths(folded) == {"0": 5, "3": 11, "6": 16}
    assert_equal(model, folded)


def test_a_layer_that_died_keeps_one_channel() -> None:
    model = chain()
    kill(model, "4", list(range(12)), -1.0)
    folded = fold_dead_channels(model, images())
    assert widths(folded)["3"] == 1 and widths(folded)["0"] == 1
    assert_equal(model, folded)


def test_bias_without_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 8, 1), nn.PReLU(8), nn.Conv2d(8, 4, 2, bias=False),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 5),
    )  # fmt: skip
    model = randomise(model).double().eval()
    kill(model, "1", [0, 5], -1.3)  # hardswish(-1.3) is no zero
    weight_of(model, "3").data[2] = 0  # the constant of its bias, through PReLU
    folded = fold_dead_channels(model, images())
    assert widths(folded) == {"0": 4, "3": 7, "5": 4}
    assert folded[5].bias is not None  # born to carry the constant
    assert_equal(model, folded)


def test_depthwise_behind_a_constant() -> None:
    """A padded depthwise layer turns a constant into a border pattern, which is not dead; a zero stays zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6, groups=6), nn.BatchNorm2d(6), nn.ReLU6(),
        conv(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5),
    )  # fmt: skip
    model = randomise(model).double().eval()
    kill(model, "1", [1], 0.9)
    kill(model, "1", [2, 3], -0.9)  # zero before, a constant of its own behind
    kill(model, "4", [4], 9.0)  # 6 after ReLU6
    folded = fold_dead_channels(model, images())
    assert widths(folded)["0"] == 3
    assert_equal(model, folded)


def test_streams_of_residual_networks() -> None:
    """A stream channel is dead where all that is added to it is constant; its readers see different constants."""
    model = residual()
    kill(model, "0.1", [0, 1, 2], -1.0)
    kill(model, "1.bn2", [1, 2, 3], -1.0)  # with the above: 1 and 2 are dead in the whole stream
    kill(model, "2.bn1", [0, 1, 5], 0.5)
    folded = fold_dead_channels(model, images())
    assert widths(folded)["0.0"] == 6 and widths(folded)["2.conv1"] == 14
    assert_equal(model, folded)


def test_limits_hold_for_dead_channels_too() -> None:
    model = chain()
    kill(model, "4", list(range(10)), -1.0)
    limits = Budget(ratio=0.5, min_fraction=0.5, round_to=4)
    folded = fold_dead_channels(model, images(), limits=limits)
    assert widths(folded)["3"] == 8
    assert_equal(model, folded)


def test_nothing_dead_gives_an_equal_copy() -> None:
    model = chain()
    folded = fold_dead_channels(model, images())
    assert folded is not model and folded[0].weight is not model[0].weight
    assert torch.equal(folded(images()), model(images()))


def test_what_cannot_be_traced_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"torch\.fx"):
        fold_dead_channels(Untraceable(), images())


@settings(max_examples=int(os.environ.get("RMPRUNE_PROPERTY_DRAWS", draws(12, 5))), deadline=None)
@given(data=st.data(), kernel=st.sampled_from([1, 2, 3]), padded=st.booleans(), seed=st.integers(0, 50))
def test_always_exact(data: st.DataObject, kernel: int, padded: bool, seed: int) -> None:
    model = chain(kernel=kernel, padding=1 if padded and kernel > 1 else 0, seed=seed)
    for name, size in (("1", 8), ("4", 12), ("7", 16)):
        kill(model, name, data.draw(st.lists(st.integers(0, size - 1), max_size=size, unique=True)))
    generator = torch.Generator().manual_seed(seed)
    for name in ("3", "6"):
        weight = weight_of(model, name).data
        weight[torch.rand(weight.shape, generator=generator) < 0.3] = 0
        weight[:, 0] = 0
    assert_equal(model, fold_dead_channels(model, images()), 1e-11)


def test_branches_that_start_at_zero_are_not_dead() -> None:
    """Before training every scale of a branch's last norm is 0 (zero_init_residual); after it that is a dead branch."""
    model = residual()
    for block in ("1", "2", "3"):
        norm = model.get_submodule(f"{block}.bn2")
        nn.init.zeros_(norm.weight)  # type: ignore[arg-type]
        nn.init.zeros_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.ones_(norm.running_var)  # type: ignore[arg-type]
    assert widths(fold_dead_channels(model, images())) == widths(model)
    model.get_submodule("2.bn2").running_mean.fill_(0.1)  # type: ignore[operator, union-attr]
    assert widths(fold_dead_channels(model, images()))["2.conv1"] == 1


def test_what_is_dead_beyond_the_budget_is_said_and_can_be_left(caplog) -> None:  # type: ignore[no-untyped-def]
    model, budget = chain(), Budget(ratio=0.1)
    kill(model, "4", range(10), -0.5)
    assert prune(model, images(), importance="magnitude", budget=budget)[3].out_channels == 2  # type: ignore[union-attr]
    assert "beyond the budget: ratio is 0.278 where 0.1 was asked for; dead=False leaves them" in caplog.text
    caplog.clear()
    left = prune(model, images(), importance="magnitude", budget=budget, dead=False)
    assert sum(left[at].out_channels for at in (0, 3, 6)) == 32 and not caplog.text  # type: ignore[union-attr, misc]
