"""What a network costs on paper: multiply-accumulates and parameters. Measured time is latency.py's business."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from rmprune.graph.foreign import plain_module
from rmprune.graph.inputs import Inputs, as_tuple, trial
from rmprune.graph.shapes import map_of


def count_macs(model: nn.Module, example_inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass for **one** example of `example_inputs` (N, C, H, W), in eval mode.

    Several inputs: a tuple, or a dict by the names in forward. Raises UnsupportedModel where they do not fit the network.

    Counted: convolutions, linear layers, matrix products and attention, as modules or as functions, padding taps
    included, biases not; products with vectors and bilinear layers too. Not counted: batch norms, activations, pooling, additions,
    resizing. The table from operator to cost is torch's own (torch.utils.flop_counter, which counts a MAC as two operations) and
    what it lacks. Nothing is computed: the
    pass runs on shapes (the meta device), on a copy; networks that cannot run so are run for real.

    >>> rmprune.count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.randn(32, 3, 10, 10))  # 3 * 8 * 3 * 3 * 10 * 10
    21600
    """
    model = plain_module(model)
    counter = _Counter()
    trial(model, as_tuple(model, example_inputs), counter)
    return counter.macs


def count_params(model: nn.Module) -> int:
    """Number of values in all parameters, shared ones once; buffers (batch-norm statistics) not counted.

    >>> rmprune.count_params(nn.Conv2d(3, 8, 3))  # 8 * 3 * 3 * 3 weights and 8 biases
    224
    """
    return sum(p.numel() for p in model.parameters())


def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, expand_a: list[int], expand_b: list[int], expand_c: list[int], *_: Any
) -> int:
    """Of the product of three tensors that `nn.Bilinear` is: each has dimensions of 1 where its list says so."""
    sizes = []
    for tensor, ones in ((a, expand_a), (b, expand_b), (c, expand_c)):
        own = iter(tensor.shape)
        sizes.append([1 if dim in ones else next(own) for dim in range(tensor.dim() + len(ones))])
    return math.prod(map(max, *sizes))


_ATEN = torch.ops.aten
_LACKING: Mapping[Any, Callable[..., int]] = {
    _ATEN.mv: lambda matrix, vector: matrix.numel(),
    _ATEN.addmv: lambda added, matrix, vector, **_: matrix.numel(),
    _ATEN.dot: lambda a, b: a.numel(),
    _ATEN.vdot: lambda a, b: a.numel(),
    _ATEN.addbmm: lambda added, a, b, **_: a.numel() * b.shape[2],
    _ATEN._trilinear: _trilinear,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q.shape, k.shape, v.shape) // 2
    ),
}
"""MACs of products that torch's table of costs lacks."""


class _Counter(TorchDispatchMode):
    """Adds up the cost of every operator that reaches the dispatcher, where none stands for several: on CPUs a recurrent layer and
    attention would be one each, of no cost."""

    def __init__(self) -> None:
        super().__init__()
        self.macs, self.before = 0, (True, True)

    def __enter__(self) -> "_Counter":
        self.macs = 0  # a run that failed does not count
        self.before = bool(torch.backends.mkldnn.enabled), torch.backends.mha.get_fastpath_enabled()
        self._set(False, False)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._set(*self.before)

    @staticmethod
    def _set(mkldnn: bool, attention: bool) -> None:
        torch.backends.mkldnn.enabled = mkldnn  # type: ignore[assignment]
        torch.backends.mha.set_fastpath_enabled(attention)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        plain = packet is _ATEN.convolution and not args[6] and not kwargs  # nothing transposed
        out = map_of(*(*args[:6], args[8])) if plain else None
        out = func(*args, **kwargs) if out is None else out
        if (lacking := _LACKING.get(packet)) is not None:
            self.macs += lacking(*args, **kwargs)
        elif (cost := flop_registry.get(packet)) is not None:
            self.macs += cost(*args, **kwargs, out_val=out) // 2
        return out
