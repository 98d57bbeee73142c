"""The node-by-node runner: the module's own outputs, and values that are let go after their last reader."""

import weakref
from typing import Any

import pytest
import torch
from removal_nets import basic, conv, conv_bn, images, prepared
from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.network import Network
from rmprune.graph.normalise import normalise
from rmprune.graph.run import Values, run


class Everything(nn.Module):
    """A layer, a function, a method, a parameter of its own, an input with a default, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = conv(3, 4), nn.Parameter(torch.full((4, 1, 1), 2.0))

    def forward(self, x: Tensor, shift: float = 0.5) -> tuple[Tensor, Tensor]:
        y = torch.cat([self.conv(x), self.gain + self.conv(x).sigmoid()], 1)
        return y + shift, y.amax((2, 3))


def read(model: nn.Module, *inputs: Tensor) -> Network:
    return normalise(model.double().eval().requires_grad_(False), inputs)


@pytest.mark.parametrize(
    "model", [Everything(), prepared(*conv_bn(3, 6), nn.ReLU(), basic(6))], ids=["each kind of node", "a residual"]
)
def test_the_last_value_is_what_the_module_returns(model: nn.Module) -> None:
    x = images()
    network = read(model, x)
    nodes, values = zip(*run(network.graph, (x,), network.value), strict=True)
    assert list(nodes) == list(network.graph.nodes)
    expected, found = model(x), values[-1]
    for a, b in zip(*(each if isinstance(each, tuple) else (each,) for each in (expected, found)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kept", [False, True])
def test_a_value_is_let_go_after_its_last_reader(kept: bool) -> None:
    """Of a chain of ten one map lives at a time; one that is read `later` lives until then."""
    x = images()
    network = read(nn.Sequential(*(nn.Softsign() for _ in range(10))), x)
    nodes = list(network.graph.nodes)
    alive: list[weakref.ref[Tensor]] = []
    later = {nodes[8]: (nodes[1],)} if kept else None
    most = []

    def value_of(node: fx.Node, values: Values) -> Any:
        assert not kept or node is not nodes[8] or nodes[1] in values
        value = network.value(node, values)
        if node.op == "call_module":
            alive.append(weakref.ref(value))
        return value

    for _ in run(network.graph, (x.clone(),), value_of, later):
        most.append(sum(each() is not None for each in alive))
    assert max(most) == (2 if kept else 1)
    assert not kept or alive[0]() is None


def test_inputs_that_do_not_fit_are_refused() -> None:
    x = images()
    network = read(Everything(), x)
    with pytest.raises(UnsupportedModel, match="fewer inputs than the 3 given"):
        list(run(network.graph, (x, x, x), network.value))
    with pytest.raises(UnsupportedModel, match="takes an input 'x' that example_inputs lack"):
        list(run(network.graph, (), network.value))
