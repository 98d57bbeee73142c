"""Random residual networks for the property test: a hypothesis strategy of specs, and the module each spec stands for.

A spec is a tree of frozen dataclasses, so that a failing draw prints as the code that builds it again: `Network(spec)`.
Not only what RM can remove: in-place traps, shortcuts on another grid, batch norms without statistics are drawn too.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn


@dataclass(frozen=True)
class Act:
    kind: str = "none"
    args: tuple[float, ...] = ()
    inplace: bool = False
    functional: bool = False


@dataclass(frozen=True)
class Conv:
    """A convolution, its norm, its activation, and what follows (a gate, a concatenation with the input, a pool)."""

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    mode: str = "zeros"
    bias: bool = False
    norm: str = "batch"
    act: Act = Act()
    extra: str = "none"


@dataclass(frozen=True)
class Shortcut:
    kind: str = "identity"
    conv: Conv | None = None
    pool: tuple[Any, ...] = ()
    """kernel, stride, padding, ceil_mode, count_include_pad"""
    inner: tuple[Any, ...] = ()
    """residual blocks at its end"""


@dataclass(frozen=True)
class Block:
    """act(branch(x) + shortcut(x)); with `pre`, norm and activation come first, the shortcut before or after them."""

    branch: tuple[Any, ...]
    shortcut: Shortcut = Shortcut()
    act: Act = Act()
    pre: Act | None = None
    pre_norm: str = "batch"
    shortcut_after_pre: bool = False
    add: str = "add"
    third: Conv | None = None
    twice: bool = False
    long_skip: bool = False


@dataclass(frozen=True)
class Spec:
    channels: int
    size: tuple[int, int]
    parts: tuple[Any, ...]
    head: bool = True
    tap: bool = False
    scale: float = 1.0
    seed: int = 0


# ---------------------------------------------------------------- modules


class Activation(nn.Module):
    def __init__(self, act: Act, channels: int) -> None:
        super().__init__()
        self.act = act
        kind, args, inplace = act.kind, act.args, act.inplace
        stock = {
            "relu": lambda: nn.ReLU(inplace),
            "relu6": lambda: nn.ReLU6(inplace),
            "hardtanh": lambda: nn.Hardtanh(*args, inplace=inplace),
            "hardswish": lambda: nn.Hardswish(inplace),
            "hardsigmoid": lambda: nn.Hardsigmoid(inplace),
            "leaky_relu": lambda: nn.LeakyReLU(args[0], inplace),
            "prelu": lambda: nn.PReLU(channels if args[0] else 1),
            "silu": lambda: nn.SiLU(inplace),
            "gelu": nn.GELU,
            "elu": lambda: nn.ELU(inplace=inplace),
            "tanh": nn.Tanh,
            "softplus": nn.Softplus,
            "none": nn.Identity,
        }
        self.module = None if act.functional else stock[kind]()
        if kind == "prelu" and self.module is not None:
            nn.init.uniform_(self.module.weight, -0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.module is not None:
            return self.module(x)
        kind, args = self.act.kind, self.act.args
        if kind == "relu":
            return torch.relu_(x) if self.act.inplace else x.relu()
        if kind == "relu6":
            return F.relu6(x, inplace=self.act.inplace)
        if kind == "hardtanh":
            return torch.clamp(x, args[0], args[1])
        if kind == "leaky_relu":
            return F.leaky_relu(x, args[0])
        return F.hardswish(x) if kind == "hardswish" else F.silu(x)


def norm(kind: str, channels: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "group":
        return nn.GroupNorm(1, channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels)
    bn = nn.BatchNorm2d(channels, affine=kind != "batch_plain", track_running_stats=kind != "batch_live")
    if bn.affine:
        nn.init.normal_(bn.weight, 0.5)
        nn.init.normal_(bn.bias)
        bn.weight.data[torch.rand(channels) < 0.1] = 0
    if bn.running_mean is not None:
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.05, 3)
    return bn


class Layer(nn.Module):
    def __init__(self, in_channels: int, spec: Conv) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            spec.channels,
            spec.kernel,
            spec.stride,
            spec.padding,
            spec.dilation,
            spec.groups,
            spec.bias,
            spec.mode,
        )
        self.norm = norm(spec.norm, spec.channels)
        self.act = Activation(spec.act, spec.channels)
        self.extra = spec.extra
        self.out_channels = spec.channels * 2 if spec.extra == "concat" else spec.channels
        if spec.extra in ("gate", "hard_gate"):
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(spec.channels, spec.channels, 1),
                nn.Sigmoid() if spec.extra == "gate" else nn.Hardsigmoid(),
            )
        if spec.extra in ("avgpool", "maxpool"):
            pool = nn.AvgPool2d if spec.extra == "avgpool" else nn.MaxPool2d
            self.pool = pool(3, 1, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        if self.extra in ("gate", "hard_gate"):
            return y * self.gate(y)
        if self.extra == "concat":
            return torch.cat([y, -y], 1)
        if self.extra in ("avgpool", "maxpool"):
            return self.pool(y)
        if self.extra == "scale":
            return 0.5 * y
        return self.dropout(y) if self.extra == "dropout" else y


class ShortcutPath(nn.Module):
    def __init__(self, channels: int, spec: Shortcut) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if spec.pool:
            kernel, stride, padding, ceil, count = spec.pool
            layers.append(nn.AvgPool2d(kernel, stride, padding, ceil, count))
        if spec.kind == "maxpool":
            layers.append(nn.MaxPool2d(3, 1, 1))
        if spec.kind == "norm":
            layers.append(norm("batch", channels))
        if spec.conv is not None:
            layers.append(Layer(channels, spec.conv))
        if spec.inner:
            layers.append(chain(channels if spec.conv is None else spec.conv.channels, spec.inner)[0])
        self.path = nn.Sequential(*layers)
        self.empty = not layers

    def forward(self, x: Tensor) -> Tensor:
        return x if self.empty else self.path(x)


class Residual(nn.Module):
    def __init__(self, channels: int, spec: Block) -> None:
        super().__init__()
        self.spec = spec
        if spec.pre is not None:
            self.pre_norm = norm(spec.pre_norm, channels)
            self.pre = Activation(spec.pre, channels)
        self.branch, self.out_channels = chain(channels, spec.branch)
        self.shortcut = ShortcutPath(channels, spec.shortcut)
        self.third = None if spec.third is None else Layer(channels, spec.third)
        self.act = Activation(spec.act, self.out_channels)

    def once(self, x: Tensor) -> Tensor:
        first = x
        if self.spec.pre is not None:
            first = self.pre(self.pre_norm(x))
        out = self.branch(first)
        source = first if self.spec.shortcut_after_pre else x
        out = added(out, self.shortcut(source), self.spec.add)
        if self.third is not None:
            out = out + self.third(source)
        out = self.act(out)
        return out + x if self.spec.long_skip else out

    def forward(self, x: Tensor) -> Tensor:
        out = self.once(x)
        return self.once(out) if self.spec.twice else out


def added(branch: Tensor, shortcut: Tensor, form: str) -> Tensor:
    if form == "iadd":
        branch += shortcut
        return branch
    if form == "iadd_shortcut":
        shortcut += branch
        return shortcut
    if form == "alpha":
        return torch.add(branch, shortcut, alpha=-2)
    if form == "method":
        return shortcut.add(branch)
    if form == "sub":
        return branch - shortcut
    return (
        shortcut + branch if form == "radd" else torch.add(branch, shortcut) if form == "torch" else branch + shortcut
    )


def chain(channels: int, specs: tuple[Any, ...]) -> tuple[nn.Sequential, int]:
    layers: list[nn.Module] = []
    for spec in specs:
        layer = Layer(channels, spec) if isinstance(spec, Conv) else Residual(channels, spec)
        layers.append(layer)
        channels = layer.out_channels
    return nn.Sequential(*layers), channels


class Network(nn.Module):
    """The network of a spec: float64, eval mode, weights from the spec's seed; input (N, spec.channels, *spec.size)."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            self.body, channels = chain(spec.channels, spec.parts)
            self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, 3)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    fan = module.weight[0].numel()
                    nn.init.normal_(module.weight, 0, spec.scale * (2 / fan) ** 0.5)
                    if module.bias is not None:
                        nn.init.normal_(module.bias)
        self.spec = spec
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        first = self.body[0](x)
        out = first
        for index in range(1, len(self.body)):
            out = self.body[index](out)
        if self.spec.head:
            out = self.head(self.flatten(self.pool(out)))
        return out + first.mean([1, 2, 3], keepdim=True).flatten(1) if self.spec.head and self.spec.tap else out


# ---------------------------------------------------------------- strategies


def often(usual: Any, *others: Any, weight: int = 4) -> st.SearchStrategy[Any]:
    """`usual` about `weight` times as often as each of the others."""
    return st.sampled_from([usual] * weight + list(others))


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


ACTS = [
    Act("relu"),
    Act("relu", inplace=True),
    Act("relu", functional=True),
    Act("relu", functional=True, inplace=True),
    Act("relu6"),
    Act("relu6", inplace=True),
    Act("relu6", functional=True, inplace=True),
    Act("hardtanh", (-1.0, 1.0)),
    Act("hardtanh", (-1.0, 1.0), inplace=True),
    Act("hardtanh", (-2.0, 3.0)),
    Act("hardtanh", (0.5, 2.0)),
    Act("hardtanh", (0.0, 4.0), functional=True),
    Act("hardtanh", (-3.0, -1.0), functional=True),
    Act("hardswish"),
    Act("hardswish", functional=True),
    Act("leaky_relu", (0.1,)),
    Act("leaky_relu", (-0.3,)),
    Act("leaky_relu", (1.5,), functional=True),
    Act("prelu", (0,)),
    Act("prelu", (1,)),
    Act("none"),
    Act("none"),
]
ODD_ACTS = [
    Act("silu"),
    Act("gelu"),
    Act("elu"),
    Act("tanh"),
    Act("softplus"),
    Act("hardsigmoid"),
    Act("silu", (), True),
]


@st.composite
def acts(draw: st.DrawFn) -> Act:
    return draw(st.sampled_from(ODD_ACTS if draw(st.integers(0, 11)) == 0 else ACTS))


@st.composite
def convs(
    draw: st.DrawFn,
    channels: int,
    size: tuple[int, int],
    *,
    out_channels: int | None = None,
    stride: bool = False,
    act: Act | None = None,
) -> tuple[Conv, tuple[int, int]]:
    """A convolution of (channels, *size) and the size it leaves, at least 1."""
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (3, 3), (3, 3), (5, 5), (3, 1), (1, 3), (2, 2), (1, 5)]))
    dilation = draw(often((1, 1), (2, 2), (1, 2), weight=6))
    strides = draw(st.sampled_from([(2, 2), (2, 2), (2, 2), (2, 1), (1, 2), (3, 3)])) if stride else (1, 1)
    same = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    padding = draw(often(same, (0, 0), (1, 1), (2, 2), weight=12))
    if out_channels is None:
        out_channels = draw(st.integers(1, 4)) * draw(st.sampled_from([1, channels]))
    divisors = [g for g in range(1, channels + 1) if channels % g == 0 and out_channels % g == 0]
    groups = draw(st.sampled_from([1, 1, *divisors, divisors[-1]]))
    mode = draw(often("zeros", "reflect", "replicate", "circular", weight=20))
    left = tuple(out_size(*each) for each in zip(size, kernel, strides, padding, dilation, strict=True))
    if min(left) < 1 or any(p >= s for p, s in zip(padding, size, strict=True)):
        kernel, padding, dilation, mode = (1, 1), (0, 0), (1, 1), "zeros"
        left = tuple(out_size(s, 1, t, 0, 1) for s, t in zip(size, strides, strict=True))
    return (
        Conv(
            out_channels,
            kernel,
            strides,
            padding,
            dilation,
            groups,
            mode,
            bias=draw(st.booleans()),
            norm=draw(often("batch", "none", "none", "batch_plain", "batch_live", "group", "instance", weight=20)),
            act=draw(acts()) if act is None else act,
            extra=draw(often("none", "dropout", "gate", "hard_gate", "scale", "maxpool", "avgpool", weight=24)),
        ),
        (left[0], left[1]),
    )


def matching_windows(size: tuple[int, int], left: tuple[int, int]) -> list[tuple[Any, ...]]:
    """(kernel, stride, padding, dilation), each a pair, of all windows that take `size` to `left`."""
    per_axis = [
        [w for w in itertools.product((1, 3, 2), (1, 2, 3), (0, 1), (1, 2)) if out_size(s, *w) == t and w[2] < s]
        for s, t in zip(size, left, strict=True)
    ]
    pairs = itertools.product(*per_axis)
    return [
        tuple(zip(*pair, strict=True)) for pair in pairs if pair[0] == pair[1] or pair[0][0] == 1 or pair[1][0] == 1
    ]


@st.composite
def shortcuts(
    draw: st.DrawFn, channels: int, size: tuple[int, int], out_channels: int, left: tuple[int, int]
) -> Shortcut | None:
    if size == left and channels == out_channels and draw(st.integers(0, 2)):
        kind = draw(often("identity", "norm", "maxpool", "depthwise", "pool", weight=12))
        if kind == "depthwise":
            bias, normed = draw(st.booleans()), draw(often("batch", "none"))
            return Shortcut("conv", Conv(channels, groups=channels, bias=bias, norm=normed))
        return Shortcut("pool", None, (3, 1, 1, False, draw(st.booleans()))) if kind == "pool" else Shortcut(kind)
    windows = matching_windows(size, left)
    simple = [w for w in windows if w[0] == (1, 1) and w[2] == (0, 0) and w[3] == (1, 1)]
    if not windows:
        return None
    act = draw(often(Act("none"), Act("relu"), weight=15))
    normed, bias = draw(often("batch", "none", weight=3)), draw(st.booleans())
    divisors = [g for g in range(1, channels + 1) if channels % g == 0 and out_channels % g == 0]
    groups = draw(st.sampled_from([1, 1, 1, divisors[-1]]))
    if draw(st.integers(0, 3)) == 0:  # ResNet-D: average pool, then 1x1
        pools = [
            (k, s, p, ceil)
            for k, s, p, ceil in itertools.product((2, 3), (1, 2, 3), (0, 1), (False, True))
            if 2 * p <= k and all(pooled(n, k, s, p, ceil) == t for n, t in zip(size, left, strict=True))
        ]
        if pools:
            pool = (*draw(st.sampled_from(pools)), draw(st.booleans()))
            return Shortcut("pool", Conv(out_channels, bias=bias, norm=normed, act=act, groups=groups), pool)
    kernel, stride, padding, dilation = draw(st.sampled_from(simple if simple and draw(st.integers(0, 2)) else windows))
    return Shortcut(
        "conv", Conv(out_channels, kernel, stride, padding, dilation, bias=bias, norm=normed, act=act, groups=groups)
    )


def pooled(size: int, kernel: int, stride: int, padding: int, ceil: bool) -> int:
    if size + 2 * padding < kernel:
        return 0
    return nn.functional.avg_pool1d(torch.zeros(1, 1, size), kernel, stride, padding, ceil).shape[-1]


@st.composite
def linear_residuals(draw: st.DrawFn, channels: int, size: tuple[int, int], depth: int = 1) -> tuple[Block, ...]:
    """One or two residual blocks in a row without any activation, that keep channels and size."""
    found = []
    for _ in range(draw(often(1, 2))):
        widths = [draw(st.sampled_from([channels, channels + 1, 2 * channels])) for _ in range(draw(st.integers(0, 2)))]
        layers: list[Any] = []
        for before, width in itertools.pairwise([channels, *widths, channels]):
            kernel, padding = draw(often(((1, 1), (0, 0)), ((3, 3), (1, 1))))
            groups = before if before == width and draw(st.integers(0, 4)) == 0 else 1
            bias, normed = draw(st.booleans()), draw(often("batch", "none", weight=1))
            layers.append(Conv(width, kernel, padding=padding, groups=groups, bias=bias, norm=normed))
        if depth and draw(st.integers(0, 4)) == 0:
            layers += draw(linear_residuals(channels, size, depth - 1))
        if draw(st.integers(0, 3)) == 0:
            shortcut = Shortcut("conv", Conv(channels, bias=draw(st.booleans()), norm=draw(often("batch", "none"))))
        else:
            inner = draw(linear_residuals(channels, size, depth - 1)) if depth and draw(st.integers(0, 3)) == 0 else ()
            shortcut = Shortcut(inner=inner)
        found.append(Block(tuple(layers), shortcut, add=draw(often("add", "radd", "iadd", weight=3))))
    return tuple(found)


@st.composite
def blocks(draw: st.DrawFn, channels: int, size: tuple[int, int], depth: int) -> tuple[Any, int, tuple[int, int]]:
    """A residual block (or, where no shortcut fits, its branch alone), and the channels and size it leaves."""
    before, x_channels = size, channels
    layers: list[Any] = []
    count = draw(st.integers(1, 3))
    strided = draw(st.integers(0, 3)) == 0
    at = draw(st.integers(0, count - 1))
    style = draw(st.sampled_from(["post", "post", "pre", "linear"]))
    keeps = draw(st.integers(0, 3)) > 0
    for index in range(count):
        if depth and draw(st.integers(0, 11)) == 0:
            inner, channels, size = draw(blocks(channels, size, depth - 1))
            layers += [inner] if isinstance(inner, Block) else inner
            continue
        last = index == count - 1
        act = draw(often(Act("none"), Act("relu"), weight=12)) if last else None
        width = x_channels if last and keeps else None
        layer, size = draw(convs(channels, size, out_channels=width, stride=strided and index == at, act=act))
        layers.append(layer)
        channels = layer.channels
    shortcut = draw(shortcuts(x_channels, before, channels, size))
    if shortcut is None:
        return layers, channels, size
    if draw(st.integers(0, 11)) == 0:
        shortcut = replace(shortcut, inner=draw(linear_residuals(channels, size)))
    same = (x_channels, before) == (channels, size)
    third = Conv(channels, bias=True) if before == size and draw(st.integers(0, 9)) == 0 else None
    block = Block(
        branch=tuple(layers),
        shortcut=shortcut,
        act=draw(acts()) if style == "post" else Act("none"),
        pre=draw(acts()) if style == "pre" else None,
        pre_norm=draw(often("batch", "none")),
        shortcut_after_pre=style == "pre" and draw(st.booleans()),
        add=draw(often("add", "radd", "torch", "method", "iadd", "iadd_shortcut", "alpha", "sub", weight=8)),
        third=third,
        twice=same and draw(st.integers(0, 11)) == 0,
        long_skip=same and draw(st.integers(0, 11)) == 0,
    )
    return block, channels, size


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Specs of networks with at least one residual block where one fits, at most about 12 convolutions."""
    first = draw(st.integers(1, 4))
    size = start = (draw(st.integers(4, 9)), draw(st.integers(4, 9)))
    channels = first
    parts: list[Any] = []
    if draw(st.integers(0, 4)):
        layer, size = draw(convs(channels, size))
        parts.append(layer)
        channels = layer.channels
    for _ in range(draw(st.integers(1, 3))):
        block, channels, size = draw(blocks(channels, size, 1))
        parts += [block] if isinstance(block, Block) else block
        if draw(st.integers(0, 11)) == 0:
            parts.append(Conv(channels, (1, 1), extra="concat", act=draw(acts())))
            channels *= 2
    return Spec(
        channels=first,
        size=start,
        parts=tuple(parts),
        head=draw(st.booleans()),
        tap=draw(st.integers(0, 9)) == 0,
        scale=draw(st.sampled_from([0.3, 1.0, 1.0, 4.0])),
        seed=draw(st.integers(0, 10**6)),
    )
