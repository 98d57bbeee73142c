"""Copies of networks, made without deepcopy's ceremony: what deepcopy keeps apart or together stays so."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rmprune.graph.copied import copied
from rmprune.graph.foreign import reference_copy


class Own(nn.Module):
    """State of many kinds: tied weights, one list in two places, a module in a list, a bound method, a computed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.two.weight = self.one.weight
        self.seen: list[int] = []
        self.facts = {"seen": self.seen, "empty": {}, ("a", 1): (self.seen, 2)}
        self.hidden, self.call = [nn.Linear(2, 2)], self.one.forward
        self.computed = self.one.weight * 2
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.one.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.seen.append(1)

    def forward(self, x: Tensor) -> Any:
        return self.two(self.call(self.one(x)))


class MadeAnew(nn.Module):
    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.inner, self.width = inner, len(inner.weight)

    def __reduce__(self) -> Any:
        return MadeAnew, (self.inner,)


class Saying(nn.Module):
    def __deepcopy__(self, memo: Any) -> Any:
        return memo["said"]


def test_what_a_module_holds() -> None:
    net, x = Own(), torch.ones(1, 3, 2, 2)
    twin = copied(net)
    assert type(twin) is Own and torch.equal(twin(x), net(x)) and net.seen == twin.seen == [1]
    assert twin.facts["seen"] is twin.seen is twin.facts["a", 1][0] is not net.seen and twin.facts["empty"] == {}
    assert twin.two.weight is twin.one.weight is not net.one.weight
    assert twin.call.__self__ is twin.one and twin.hidden[0] is not net.hidden[0]
    assert twin.computed.grad_fn is None and twin._non_persistent_buffers_set == {"steps"}
    assert twin._buffers is not net._buffers and twin.one._forward_hooks is not net.one._forward_hooks
    said, anew = object(), copied(nn.Sequential(MadeAnew(nn.Conv2d(1, 2, 1))))[0]
    assert anew.width == 2 and set(anew.state_dict()) == {"inner.weight", "inner.bias"}
    assert copied(Saying(), {"said": said}) is said  # type: ignore[dict-item]


@pytest.mark.parametrize("nested", [False, True])
def test_a_copied_graph_computes_with_its_own_layers_and_code(nested: bool) -> None:
    net = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    net.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 2, 2)
    twin: Any = copied(nn.Sequential(net))[0] if nested else copied(net)
    assert torch.equal(twin(x), net(x)) and twin._forward_hooks and twin.graph is not net.graph
    nn.init.ones_(twin.get_submodule("0").bias)
    nn.init.zeros_(twin.get_submodule("0").weight)
    assert torch.equal(twin(x), torch.ones(2, 4, 2, 2)) and not torch.equal(net(x), twin(x))
    for edited, other in ((net, twin), (twin, copied(twin))):  # of either, and of a copy's copy
        kept = other(x)
        end = next(node for node in edited.graph.nodes if node.op == "output")
        end.args = (edited.graph.find_nodes(op="placeholder")[0],)
        edited.recompile()
        assert torch.equal(edited(x), x) and torch.equal(other(x), kept)
    assert torch.equal(copy.deepcopy(twin)(x), x)


def test_the_graph_of_a_copy_is_its_own() -> None:
    twin = copied(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())))
    assert twin.graph.owning_module is twin
    twin.graph.eliminate_dead_code()


class Moving(nn.Module):
    """It takes a tensor along that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.held = nn.BatchNorm1d(2), torch.ones(2)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.held = fn(self.held)
        return super()._apply(fn, recurse)


def test_a_reference_is_in_double_and_shares_nothing() -> None:
    net = Moving()
    twin = reference_copy(net)
    assert {t.dtype for t in (twin.held, *twin.parameters(), *twin.buffers())} == {torch.float64, torch.int64}
    assert not twin.training and not any(p.requires_grad for p in twin.parameters()) and net.held.dtype == torch.float32
    for other in (twin, copied(net), copied(net.double())):
        assert not {t.data_ptr() for t in net.state_dict().values()} & {
            t.data_ptr() for t in other.state_dict().values()
        }
