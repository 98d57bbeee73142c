"""No narrow 1x1 convolution reaches oneDNN with a stride while gradients are wanted (oneDNN issue 6035), and values stay."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rmprune.pruning.coupled import loss_gradients
from rmprune.training.convolutions import NARROW, TrainableConvolutions
from rmprune.training.precision import autocast


class Convolutions(TorchDispatchMode):
    """Collects (kernel shape, stride) of what is computed within it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.seen.append((tuple(args[1].shape), tuple(args[3])))
        return func(*args, **(kwargs or {}))

    @property
    def dangerous(self) -> bool:
        return any(shape[2:] == (1, 1) and shape[1] < NARROW and max(stride) > 1 for shape, stride in self.seen)


@pytest.mark.parametrize("stride", [2, (2, 1), (1, 3)])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (2, 1), (4, 1), (7, 1), (12, 1), (16, 1), (8, 4), (8, 8)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_gradients_of_narrow_strided_convolutions_are_right(
    channels: int, groups: int, kernel: int, stride: int | tuple[int, int]
) -> None:
    convolution = nn.Conv2d(channels, 16, kernel, stride=stride, padding=kernel // 2, groups=groups)
    x = torch.randn(16, channels, 14, 14, generator=torch.Generator().manual_seed(0))
    exact, exact_x = copy.deepcopy(convolution).double(), x.double().requires_grad_()
    wanted = exact(exact_x)
    wanted.square().sum().backward()
    convolution.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with autocast("float32", torch.device("cpu")), Convolutions() as computed:
        found = convolution(x)
    found.square().sum().backward()
    assert len(computed.seen) == 1 and not computed.dangerous
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-4)
    for own, reference in zip(convolution.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), reference.grad, rtol=1e-4, atol=1e-2)


def test_scores_by_gradients_are_computed_so_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, stride=2), nn.Flatten(), nn.LazyLinear(4))
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    model(x)
    with Convolutions() as computed:
        loss_gradients(model, [(x, y)])
    assert len(computed.seen) == 2 and not computed.dangerous


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_an_autocast_is_kept(dtype: torch.dtype) -> None:
    depthwise, x = nn.Conv2d(8, 8, 3, stride=2, groups=8), torch.randn(2, 8, 9, 9)
    with TrainableConvolutions(), torch.autocast("cpu", dtype=dtype):
        found = depthwise(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), depthwise(x), rtol=1e-2, atol=1e-2)


def test_nothing_changes_where_no_gradients_are_wanted() -> None:
    with TrainableConvolutions(), torch.no_grad(), Convolutions() as computed:
        nn.Conv2d(4, 8, 1, stride=2)(torch.randn(1, 4, 8, 8))
    assert computed.seen == [((8, 4, 1, 1), (2, 2))]
