"""Where reserved channels lie."""

import pytest
import torch
from removal_nets import Residual, branch, conv_bn, prepared, refused, removed, stem
from torch import nn

from rmprune.graph.obstacle import Obstacle
from rmprune.removal.layout import Wire, lay_out


def test_layouts() -> None:
    """The last extra group is filled up; interleaved groups hold own channels first."""
    tail = lay_out(Wire(0, 4, 4), 8, torch.full((6,), -1))
    assert tail.total == 16 and tail.reserved.tolist() == [8, 9, 10, 11, 12, 13]
    woven = lay_out(Wire(2), 4, torch.tensor([0, 1, 1]))
    assert woven.total == 8
    assert woven.computed.tolist() == [0, 1, 4, 5] and woven.reserved.tolist() == [2, 6, 7]
    with pytest.raises(Obstacle, match="more copies than it is given"):
        lay_out(Wire(0, 1, 1), 4, torch.full((3,), -1), extra_groups=2)


def test_extra_groups_in_the_middle() -> None:
    """ResNeXt: reserved channels join as whole groups of the same width, zeros fill the last."""
    layers = [conv_bn(6, 8, 1), conv_bn(8, 8, groups=2), conv_bn(8, 6, 1)]
    removal = removed(prepared(*stem(), Residual(branch(*layers), None, nn.ReLU())))
    middle = [m for m in removal.model if isinstance(m, nn.Conv2d)][2]
    assert (middle.groups, middle.in_channels, middle.out_channels) == (4, 16, 16)


def test_depthwise_in_the_middle() -> None:
    layers = [conv_bn(6, 8, 1), conv_bn(8, 8, groups=8), conv_bn(8, 6, 1)]
    removal = removed(prepared(*stem(), Residual(branch(*layers), None, nn.ReLU())))
    middle = [m for m in removal.model if isinstance(m, nn.Conv2d)][2]
    assert (middle.groups, middle.in_channels, middle.out_channels) == (14, 14, 14)


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("where", ["first", "last", "both"])
def test_groups_at_the_ends_are_interleaved(groups: int, where: str) -> None:
    first = groups if where in ("first", "both") else 1
    last = groups if where in ("last", "both") else 1
    layers = [conv_bn(6, 12, groups=first), conv_bn(12, 6, groups=last)]
    removal = removed(prepared(*stem(), Residual(branch(*layers), None, nn.ReLU())))
    made = [m.groups for m in removal.model if isinstance(m, nn.Conv2d)][1:]
    assert made == [first, last]


def test_a_dense_shortcut_into_a_grouped_merge_copies_what_each_group_reads() -> None:
    removed(prepared(*stem(), Residual(branch(conv_bn(6, 8, 1), conv_bn(8, 4, groups=2)), conv_bn(6, 4, 1), nn.ReLU())))


def test_groups_that_do_not_fit_are_refused() -> None:
    layers = [conv_bn(6, 6, groups=2), conv_bn(6, 6, groups=3)]
    refused(prepared(*stem(), Residual(branch(*layers))), "different numbers of groups")
    silu = nn.Sequential(*conv_bn(3, 4, 1), nn.SiLU(), *conv_bn(4, 4, groups=4), nn.SiLU(), *conv_bn(4, 3, 1))
    refused(prepared(Residual(silu)), "grouped convolution")
