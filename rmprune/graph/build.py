"""Builds the modules of a rewritten graph one after the other, while inputs flow through them: batch norms are measured on the
way, outputs come out in float64 for the check, and each layer is cast to its final dtype before the next one is made."""

import copy
import keyword
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmprune.errors import NotEquivalent
from rmprune.graph.convolution import Conv, Pattern
from rmprune.graph.names import is_taken
from rmprune.graph.network import Network, flat_name, free_name
from rmprune.graph.run import Values, run
from rmprune.graph.shapes import WithoutValues, blank_inputs, to_run
from rmprune.graph.tensors import floating_tensors, tensors_in
from rmprune.graph.tracing import warn_of_left_out


@dataclass(frozen=True)
class Destination:
    """Where the result lives."""

    dtype: torch.dtype
    device: torch.device
    channels_last: bool


def destination_of(model: nn.Module) -> Destination:
    """dtype, device and memory format of a model, by its floating-point parameters."""
    tensors = list(floating_tensors(model))
    if not tensors:
        return Destination(torch.float32, torch.device("cpu"), False)
    maps = [t for t in tensors if t.dim() == 4 and min(t.shape[1:]) > 1]
    last = bool(maps) and all(
        t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in maps
    )
    return Destination(tensors[0].dtype, tensors[0].device, last)


def materialise(
    network: Network, inputs: tuple[Tensor, ...], measured: int, destination: Destination, batch_norm: bool
) -> tuple[nn.Module, Any]:
    """The network as a module, and its outputs in float64 on `inputs`.

    The first `measured` images set the batch norms that are still to be measured; batch_norm=False folds every batch norm into
    its convolution instead. The result is a flat nn.Sequential where the graph is a chain, else a GraphModule.
    Raises NotEquivalent where it does not give the shapes of these outputs.
    """
    warn_of_left_out(tuple(network.autocast), tuple(network.frozen))
    module, outputs = _Builder(network, measured, destination, batch_norm).run(inputs)
    found, expected = _shapes(_run_on_meta(module, inputs, destination.dtype)), _shapes(outputs)
    if found != expected:
        raise NotEquivalent(f"the new network gives {found}, the original {expected}: a fault")
    return module, outputs


@torch.no_grad()
def _run_on_meta(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Any:
    """What the module returns, in its own dtype, without values: what the builder ran was not yet this module."""
    try:
        with WithoutValues():
            return to_run(module)(*blank_inputs(inputs, dtype))
    except RuntimeError as error:
        raise NotEquivalent(f"the new network does not run in {dtype}: {error}") from error


def _shapes(outputs: Any) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors_in(outputs))


class _Builder:
    def __init__(self, network: Network, measured: int, destination: Destination, batch_norm: bool) -> None:
        self.network, self.measured, self.destination, self.batch_norm = network, measured, destination, batch_norm
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.own: OrderedDict[str, nn.Module | Tensor] = OrderedDict()
        self.names: dict[Any, str] = {}  # of free-standing tensors

    @torch.no_grad()
    def run(self, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, Any]:
        outputs: Any = None
        for node, value in run(self.network.graph, inputs, self._value):
            if node.op == "output":
                outputs = value
        return self._module(), outputs

    def _value(self, node: fx.Node, values: Values) -> Any:
        """The node's value; on the way the new graph gets its copy, with a module of its own."""
        layer = self.network.layer(node)
        if isinstance(layer, Conv):
            return self._conv(node, layer, values[node.args[0]])  # type: ignore[index]
        value = self.network.value(node, values)
        copied = self.nodes[node] = self.graph.node_copy(node, self.nodes.__getitem__)
        if layer is not None:
            copied.target = self._register(str(node.target), self._cast(copy.deepcopy(layer)))
        if node.op == "get_attr":
            if node.target not in self.names:
                own = value.detach().clone()
                own = nn.Parameter(own) if isinstance(value, nn.Parameter) else own
                self.names[node.target] = self._register(str(node.target), own)
            copied.target = self.names[node.target]
        return value

    def _conv(self, node: fx.Node, conv: Conv, x: Tensor) -> Tensor:
        conv = conv if self.batch_norm else conv.folded()
        module, norm = build_conv(conv), None
        value = sparse_forward(module, x, conv.pattern)
        if conv.norm is not None:
            norm = build_norm(conv, value[: self.measured])
            if not _holds(norm, conv.norm.measured, self.destination.dtype):
                return self._conv(node, conv.folded(), x)
            value = norm(value)
        source = self.nodes[node.args[0]]  # type: ignore[index]
        new = self.graph.call_module(self._register(conv.name or str(node.target), self._cast(module)), (source,))
        if norm is not None:
            new = self.graph.call_module(self._register(conv.norm_name or f"{conv.name}_bn", self._cast(norm)), (new,))
        self.nodes[node] = new
        return value

    def _register(self, name: str, own: nn.Module | Tensor) -> str:
        name = flat_name(name)
        name = free_name(f"{name}_" if keyword.iskeyword(name) or is_taken(name) else name, self.own)
        self.own[name] = own
        return name

    def _cast(self, module: nn.Module) -> nn.Module:
        module = module.to(self.destination.device, self.destination.dtype)
        if self.destination.channels_last:
            module = module.to(memory_format=torch.channels_last)
        return module.eval().requires_grad_(True)

    def _module(self) -> nn.Module:
        nodes = list(self.graph.nodes)
        inner = nodes[1:-1]
        chain = all(
            n.op == "call_module" and n.args == (p,) and not n.kwargs for n, p in zip(inner, nodes, strict=False)
        )
        if chain and nodes[0].op == "placeholder" and nodes[-1].args == (nodes[-2],):
            return nn.Sequential(OrderedDict((str(n.target), self.own[str(n.target)]) for n in inner)).eval()  # type: ignore[misc]
        root = nn.Module()
        for name, value in self.own.items():
            if isinstance(value, nn.Module):
                root.add_module(name, value)
                continue
            cast = value.detach().to(
                self.destination.device, self.destination.dtype if value.is_floating_point() else value.dtype
            )
            if isinstance(value, nn.Parameter):
                root.register_parameter(name, nn.Parameter(cast))
            else:
                root.register_buffer(name, cast)
        self.graph.lint()
        return fx.GraphModule(root, self.graph).eval()


def build_conv(conv: Conv) -> nn.Conv2d:
    """The float64 module of a convolution; the bias is left to the norm where there is one."""
    g = conv.geometry
    weight = conv.weight()
    with torch.device("meta"):
        module = nn.Conv2d(
            conv.in_channels, conv.out_channels, g.kernel, g.stride, g.padding, g.dilation, conv.groups, conv.norm is None,
            g.padding_mode,  # type: ignore[arg-type]
        )  # fmt: skip
    weight = weight.contiguous() if conv.rewritten else weight.clone()  # no two modules share memory
    module.weight = nn.Parameter(weight, requires_grad=False)
    if conv.norm is None:
        module.bias = nn.Parameter(conv.bias.clone(), requires_grad=False)
    return module.eval()


def build_norm(conv: Conv, value: Tensor) -> nn.BatchNorm2d:
    """The batch norm of a convolution without bias, whose output on the calibration images is `value` (N, C, H, W).

    Measured rows: mean m and variance v of `value`, weight sqrt(v + eps), bias m + b: in eval mode y + b, whatever m and v are,
    and in training mode the same on these images (RM.md 1). Other rows keep theirs.
    """
    norm = conv.norm
    assert norm is not None
    mean, variance = value.mean((0, 2, 3)), value.var((0, 2, 3), unbiased=False)
    module = nn.BatchNorm2d(len(mean), eps=norm.eps, momentum=norm.momentum, dtype=torch.float64)
    own = ~norm.measured
    module.running_mean = torch.where(own, norm.mean - conv.bias, mean)
    module.running_var = torch.where(own, norm.variance, variance)
    weight = torch.where(own, norm.weight, torch.sqrt(variance + norm.eps))
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = nn.Parameter(torch.where(own, norm.bias, mean + conv.bias), requires_grad=False)
    return module.eval()


def _holds(norm: nn.BatchNorm2d, measured: Tensor, dtype: torch.dtype) -> bool:
    """Whether the measured rows still multiply by 1 when rounded to `dtype`: it may not hold their variance (RM.md 10).

    float16 ends at 65504, a deviation of 256; a sixteenth is left free for the variances of further training.
    """
    rows = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    weight, bias, mean, variance = (row[measured].to(dtype).double() for row in rows)  # type: ignore[index]
    limits = torch.finfo(dtype)
    right = (weight / torch.sqrt(variance + norm.eps) - 1).abs() <= 4 * limits.eps
    return bool((right & (variance <= limits.max / 16) & torch.isfinite(mean) & torch.isfinite(bias)).all())


_WORTH = 2**16  # weights; smaller kernels run dense


def sparse_forward(module: nn.Conv2d, x: Tensor, pattern: Pattern | None) -> Tensor:
    """module(x), (N, C, H, W). Outside of `pattern` the kernel must be zero; it runs dense where that is no gain, or not so."""
    weight = module.weight
    if pattern is None or weight.numel() < _WORTH or module.groups != 1 or module.padding_mode != "zeros":
        return module(x)
    rows, columns = weight.shape[:2]
    if len(pattern.pair_rows) > 4 * (rows + columns) or len(pattern.rows) * len(pattern.columns) > 0.7 * rows * columns:
        return module(x)
    own = _take(weight, pattern)
    inside = torch.zeros(weight.shape[:2], dtype=torch.bool)
    inside[pattern.rows[:, None], pattern.columns[None]] = True
    beside = ~inside[pattern.pair_rows, pattern.pair_columns]
    pairs = torch.unique(torch.stack([pattern.pair_rows[beside], pattern.pair_columns[beside]]), dim=1)
    taps = weight[pairs[0], pairs[1]]
    if torch.count_nonzero(own) + torch.count_nonzero(taps) != torch.count_nonzero(weight):
        return module(x)
    part = F.conv2d(x[:, pattern.columns], own, None, module.stride, module.padding, module.dilation)
    out = x.new_zeros(len(x), module.out_channels, *part.shape[2:])
    out[:, pattern.rows] = part
    _add_taps(module, x, pairs[0], pairs[1], taps, out)
    return out if module.bias is None else out + module.bias[:, None, None]


def _take(weight: Tensor, pattern: Pattern) -> Tensor:
    rows, columns = len(pattern.rows), len(pattern.columns)
    if int(pattern.rows[-1]) == rows - 1 and int(pattern.columns[-1]) == columns - 1:
        return weight[:rows, :columns].contiguous()
    return weight[pattern.rows][:, pattern.columns]


def _add_taps(module: nn.Conv2d, x: Tensor, rows: Tensor, columns: Tensor, taps: Tensor, out: Tensor) -> None:
    """Adds weight * shifted input for every non-zero tap (E, kh, kw) of the (out, in) pairs."""
    top, left = int(module.padding[0]), int(module.padding[1])
    (down, right), (step_y, step_x) = module.stride, module.dilation
    padded = F.pad(x, (left, left, top, top)) if top or left else x
    height, width = out.shape[2:]
    for ky in range(taps.shape[1]):
        for kx in range(taps.shape[2]):
            used = taps[:, ky, kx] != 0
            if used.any():
                y0, x0 = ky * step_y, kx * step_x
                shifted = padded[
                    :, :, y0 : y0 + down * (height - 1) + 1 : down, x0 : x0 + right * (width - 1) + 1 : right
                ]
                out.index_add_(1, rows[used], shifted[:, columns[used]] * taps[used, ky, kx][:, None, None])
