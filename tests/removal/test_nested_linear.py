"""Linear residuals inside the shortcut of another: each node that removal inserts is walked again, and needs its range."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import long
from removal_nets import conv, conv_bn, images, prepared
from torch import Tensor, fx, nn

from rmprune.graph.build import build_conv
from rmprune.graph.convolution import Conv
from rmprune.graph.foreign import reference_copy
from rmprune.graph.network import Network, shape_of
from rmprune.graph.normalise import normalise
from rmprune.graph.ranges import annotate_ranges, observe, range_of, tighten
from rmprune.graph.run import Values, node_value, run
from rmprune.removal import remove_residuals
from rmprune.removal.blocks import additions, find_block
from rmprune.removal.rewrite import remove_all
from rmprune.removal.settings import RemovalSettings


class Sum(nn.Module):
    """The sum of what its parts make of one value; a part of none is the value itself."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        total = self.parts[0](x)
        for part in self.parts[1:]:
            total = total + part(x)
        return total


def linear(*layers: nn.Module) -> Sum:
    return Sum(nn.Sequential(*layers), nn.Identity())


def two(width: int = 4) -> Sum:
    return linear(conv(width, width, 1), conv(width, width, 1))


def outer(shortcut: nn.Module, act: nn.Module | None = None, *, width: int = 4) -> Sum:
    """act(d(x)) + shortcut(x), d 3x3 and padded."""
    return Sum(nn.Sequential(conv(width, width), act or nn.ReLU()), shortcut)


NETS = {
    "two pointwise": outer(two()),
    "three": outer(linear(conv(4, 6, 1), conv(6, 6, 1), conv(6, 4, 1))),
    "with batch norms": outer(linear(*conv_bn(4, 6, 1), *conv_bn(6, 4, 1))),
    "without a bias": outer(linear(conv(4, 4, 1, bias=False), conv(4, 4, 1, bias=False))),
    "padded": outer(linear(conv(4, 4, 3, bias=False), conv(4, 4, 1))),
    "one after the other": outer(nn.Sequential(two(), two())),
    "a layer, then a residual": outer(nn.Sequential(conv(4, 4, 1), two())),
    "one inside another": outer(Sum(nn.Sequential(conv(4, 4, 1), two()), nn.Identity())),
    "grouped": outer(linear(conv(4, 8, 1, groups=4), conv(8, 4, 1, groups=4))),
    "leaky": outer(two(), nn.LeakyReLU(0.1)),
    "bounded": outer(two(), nn.ReLU6()),
    "a deeper branch": Sum(nn.Sequential(conv(4, 5), nn.ReLU(), conv(5, 5, 1), nn.ReLU(), conv(5, 4, 1)), two()),
    "a projection as the inner shortcut": outer(Sum(nn.Sequential(conv(4, 5, 1), conv(5, 4, 1)), conv(4, 4, 1))),
    "in a branch": Sum(nn.Sequential(two(), nn.ReLU(), conv(4, 4)), two()),
}


def network(block: nn.Module) -> nn.Sequential:
    return prepared(conv(3, 4), nn.ReLU6(), block, nn.ReLU(), conv(4, 2, 1))


@pytest.mark.parametrize(
    "options",
    [{}, long({"ranges": "calibrated"}), {"form": "pair"}, long({"form": "slice"}), long({"fuse": "never"})],
    ids=str,
)
@pytest.mark.parametrize("name", NETS)
def test_exact(name: str, options: dict[str, str]) -> None:
    model, x = network(NETS[name]), images()
    removal = remove_residuals(model, x, **options)
    assert removal.max_error < 1e-10 and not removal.kept
    assert (removal.model(x) - model(x)).abs().max() < 1e-9 * model(x).abs().max()


def value_of(network: Network) -> Callable[[fx.Node, Values], Any]:
    """Runs convolutions that are data, too."""

    def own(node: fx.Node) -> Any:
        layer = network.own(node)
        return build_conv(layer.folded()) if isinstance(layer, Conv) else layer

    return lambda node, values: node_value(node, values.__getitem__, own)


@pytest.mark.parametrize("form", ["auto", "slice"])
@pytest.mark.parametrize("name", NETS)
def test_every_node_has_a_range_that_holds(name: str, form: str) -> None:
    """Also those that removal inserts, for an inner block and beside an activation."""
    x = images(count=8)
    rewritten = normalise(reference_copy(network(NETS[name])), (x,))
    annotate_ranges(rewritten, (-5.0, 5.0))
    observe(rewritten, (x,))
    assert any(report.removable for report in remove_all(rewritten, RemovalSettings(form=form, fuse="never")))
    maps = 0
    for node, value in run(rewritten.graph, (x.clamp(-5, 5),), value_of(rewritten)):
        if isinstance(value, Tensor):
            maps += 1
            low, high = range_of(node)
            slack = 1e-9 * value.abs().max()
            assert tuple(value.shape) == shape_of(node) and len(low) == len(high) == value.shape[1]
            assert bool((value.amin((0, 2, 3)) >= low - slack).all() and (value.amax((0, 2, 3)) <= high + slack).all())
    assert maps >= 6


def test_inner_maps_are_bounded_by_what_was_seen() -> None:
    """Calibrated bounds of an inner layer stay in force after its block is gone: they are not computed anew from its kernel."""
    x = images(count=8)
    rewritten = normalise(reference_copy(network(NETS["two pointwise"])), (x,))
    annotate_ranges(rewritten)
    observe(rewritten, (x,))
    tighten(rewritten, 0.0)
    (_, inner), (_, last) = additions(rewritten)
    first = find_block(rewritten, "inner", inner)
    wanted = range_of(first.branch[0])
    remove_all(rewritten, RemovalSettings([additions(rewritten)[1][0]], fuse="never"))
    made = next(node for node in rewritten.graph.nodes if str(node.target) == str(first.branch[0].target))
    assert torch.equal(range_of(made)[0][:4], wanted[0]) and torch.equal(range_of(made)[1][:4], wanted[1])
    assert last in rewritten.graph.nodes
