"""What a network costs on paper: multiply-accumulates and parameters. Measured time is latency.py's business."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rmprune.graph.shapes import on_meta


def count_macs(model: nn.Module, example_inputs: Tensor) -> int:
    """Multiply-accumulates of one forward pass for **one** example of `example_inputs` (N, C, H, W), in eval mode.

    Counted: convolutions, linear layers, matrix products and attention, as modules or as functions, padding taps
    included, biases not. Not counted: batch norms, activations, pooling, additions, resizing. The table from operator
    to cost is torch's own (torch.utils.flop_counter, which counts a MAC as two operations). Nothing is computed: the
    pass runs on shapes (the meta device), on a copy; networks that cannot run so are run for real.

    >>> rmprune.count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.randn(32, 3, 10, 10))  # 3 * 8 * 3 * 3 * 10 * 10
    21600
    """
    x = example_inputs[:1]
    try:
        return _count(on_meta(model).eval(), torch.empty(x.shape, dtype=x.dtype, device="meta"))
    except (RuntimeError, NotImplementedError):  # a tensor made on the fly, or an operator without a shape rule
        return _count(copy.deepcopy(model).eval(), x)


def count_params(model: nn.Module) -> int:
    """Number of values in all parameters, shared ones once; buffers (batch-norm statistics) not counted.

    >>> rmprune.count_params(nn.Conv2d(3, 8, 3))  # 8 * 3 * 3 * 3 weights and 8 biases
    224
    """
    return sum(p.numel() for p in model.parameters())


class _Counter(TorchDispatchMode):
    """Adds up the cost of every operator that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        cost = flop_registry.get(func._overloadpacket)
        if cost is not None:
            self.macs += cost(*args, **kwargs, out_val=out) // 2
        return out


def _count(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), _Counter() as counter:
        model(x)
    return counter.macs
