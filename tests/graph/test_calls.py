"""What a call is, however it is written."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmprune.graph.calls import writes
from rmprune.graph.fx_tracer import Tracer


class Calls(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def added(y: Tensor) -> Tensor:
    y += 1
    return y


def assigned(y: Tensor) -> Tensor:
    y[:, 0] = 1
    return y


OVER = (
    lambda y: y.relu_(), lambda y: F.relu(y, True), lambda y: F.hardtanh(y, -1.0, 1.0, True), F.hardtanh_, F.elu_, torch.relu_, added,
    assigned, lambda y: F.dropout(y, 0.5, False, True),
)  # fmt: skip
APART = (
    F.relu, lambda y: F.relu(y, False), lambda y: y.mean(1, True), lambda y: y + True, lambda y: F.dropout(y, 0.5, True),
    lambda y: torch.flatten(y, 1), lambda y: y.requires_grad_(), lambda y: (y > 0) & (y < 1) | (y > 2),
)  # fmt: skip


@pytest.mark.parametrize(("calls", "expected"), [(OVER, True), (APART, False)])
def test_what_writes_over_its_argument(calls: tuple[Callable[[Tensor], Tensor], ...], expected: bool) -> None:
    for call in calls:
        nodes = [node for node in Tracer().trace(Calls(call)).nodes if node.op not in ("placeholder", "output")]
        assert [node.format_node() for node in nodes if writes(node) != expected] == []
        assert nodes
