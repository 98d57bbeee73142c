"""Blocks whose branch holds a gate (squeeze-and-excitation): exact, with a gate of exactly 1 for the copies, or beside them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from removal_nets import Residual, basic, branch, conv_bn, images, prepared, refused, removed, stem, worst_error
from torch import Tensor, fx, nn

from rmprune.graph.normalise import normalise
from rmprune.removal import Removal, plan_removal, remove_residuals


class Squeeze(nn.Module):
    """x * gate(pool(x)), of 1x1 convolutions."""

    def __init__(self, channels: int, last: nn.Module | None = None, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.first, self.second = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)
        self.inner, self.last = inner or nn.ReLU(), last or nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.inner(self.first(self.pool(x))))) * x


class LinearSqueeze(nn.Module):
    """The same of linear layers on the pooled vectors, as code on the web has it."""

    def __init__(self, channels: int, way: str = "view") -> None:
        super().__init__()
        self.way = way
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Linear(channels, 3), nn.ReLU(), nn.Linear(3, channels, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "mean":
            return x * self.gate(x.mean((2, 3)))[:, :, None, None]
        if self.way == "unsqueeze":
            return x * self.gate(torch.flatten(self.pool(x), 1)).unsqueeze(-1).unsqueeze(-1)
        batch, channels, _, _ = x.size()
        factor = self.gate(self.pool(x).view(batch, channels)).view(batch, channels, 1, 1)
        return x * factor.expand_as(x)


def gates(removal: Removal) -> list[Tensor]:
    """The factors of the result's multiplications on ordinary images, (N, C, 1, 1) each."""
    found: list[Tensor] = []

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.target in ("mul", torch.mul) or getattr(n.target, "__name__", "") == "mul":
                found.append(self.env[n.args[1]])  # type: ignore[index]
            return value

    assert isinstance(removal.model, fx.GraphModule)
    Record(removal.model).run(images())
    return found


def cats(removal: Removal) -> int:
    assert isinstance(removal.model, fx.GraphModule)
    return sum(node.target is torch.cat for node in removal.model.graph.nodes)


def test_a_gate_at_the_end_of_a_branch() -> None:
    """As in SE-ResNet: the addition behind the gate becomes a 1x1 convolution."""
    block = Residual(nn.Sequential(branch(conv_bn(6, 6), conv_bn(6, 6)), Squeeze(6)), None, nn.ReLU())
    model = prepared(*stem(), block)
    removal = removed(model)
    assert removal.blocks[0].form == "free+gate" and not cats(removal)
    (factor,) = gates(removal)
    assert bool((factor[:, 6:] == 1).all()) and bool((factor[:, :6] < 1).all())


LAST = {"sigmoid": nn.Sigmoid(), "hard": nn.Hardsigmoid(), "clamp": nn.Hardtanh(0, 1), "tanh": nn.Tanh()}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gate_between_layers_is_exactly_one_on_the_copies(last: str, dtype: torch.dtype) -> None:
    """As in RegNet: a bottleneck with a grouped 3x3. The copies leave bit for bit, in the network's own dtype as well."""
    body = nn.Sequential(*conv_bn(6, 8, 1), nn.ReLU(), *conv_bn(8, 8, 3, groups=2), nn.ReLU(), Squeeze(8, LAST[last]))
    model = prepared(*stem(), Residual(nn.Sequential(body, *conv_bn(8, 6, 1)), None, nn.ReLU()))
    removed(model)
    removal = remove_residuals(model.to(dtype), images().to(dtype))
    assert removal.blocks[0].form == "free+gate" and removal.blocks[0].reserved == 6 and not cats(removal)
    factor = gates(remove_residuals(model.double(), images()))[0]
    assert factor.shape[1] > 8 and bool((factor[:, 8:] == 1).all())


@pytest.mark.parametrize("way", ["view", "mean", "unsqueeze"])
def test_a_gate_of_linear_layers(way: str) -> None:
    model = prepared(
        *stem(), Residual(nn.Sequential(branch(conv_bn(6, 8), nn.Sequential()), LinearSqueeze(8, way), *conv_bn(8, 6)))
    )
    removal = removed(model)
    assert "gate" in removal.blocks[0].form
    before = plan_removal(model, images())[0].macs_before
    assert before == 8 * 8 * 9 * 2 * 6 * 8 + 2 * 3 * 8, "the gate's own layers are counted"


def test_inverted_bottlenecks_with_hardswish_stay_stock() -> None:
    """As in MobileNetV3: a pair passes the first Hardswish, each of its two copies shifted the second, both the gate."""
    body = nn.Sequential(*conv_bn(4, 8, 1), nn.Hardswish(), *conv_bn(8, 8, 3, groups=8), nn.Hardswish())
    gated = Residual(nn.Sequential(body, Squeeze(8, nn.Hardsigmoid()), *conv_bn(8, 4, 1)))
    plain = Residual(nn.Sequential(*body, *conv_bn(8, 4, 1)))
    model = prepared(*conv_bn(3, 4), gated, plain)
    removal = removed(model)
    assert [block.form for block in removal.blocks] == ["gate+pair+shift", "pair+shift"]
    assert removal.blocks[0].reserved == 8 and not cats(removal)


def test_what_no_copy_passes_is_gated_on_its_slice() -> None:
    """As in EfficientNet: two SiLU with a depthwise convolution between them. One copy beside each, and the gate is the original's."""
    body = nn.Sequential(
        *conv_bn(4, 8, 1), nn.SiLU(), *conv_bn(8, 8, 3, groups=8), nn.SiLU(), Squeeze(8, inner=nn.SiLU())
    )
    model = prepared(*conv_bn(3, 4), Residual(nn.Sequential(body, *conv_bn(8, 4, 1))))
    removal = removed(model)
    assert removal.blocks[0].form == "free+slice" and removal.blocks[0].reserved == 4 and cats(removal) == 2
    assert gates(removal)[0].shape[1] == 8
    assert remove_residuals(model.float(), images().float()).own_dtype_error is not None


def test_a_gate_that_is_never_one_is_applied_to_a_slice() -> None:
    model = prepared(*stem(), Residual(nn.Sequential(*conv_bn(6, 8), Squeeze(8, nn.SiLU()), *conv_bn(8, 6))))
    removal = removed(model)
    assert "slice" in removal.blocks[0].form and cats(removal) == 1


def test_odd_gates() -> None:
    """On the fork itself; two in a row; an activation behind one; a batch norm in one; a pool alone."""
    norm = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    alone = Squeeze(6)
    alone.first = alone.second = nn.Identity()
    bodies = [
        nn.Sequential(Squeeze(6), *conv_bn(6, 6)),
        nn.Sequential(*conv_bn(6, 6), Squeeze(6), Squeeze(6, nn.Hardsigmoid()), nn.ReLU(), *conv_bn(6, 6)),
        nn.Sequential(*conv_bn(6, 6), Squeeze(6, inner=norm), nn.ReLU()),
        nn.Sequential(*conv_bn(6, 6), nn.ReLU(), alone, *conv_bn(6, 6)),
    ]
    for body in bodies:
        removed(prepared(*stem(), Residual(body, None, nn.ReLU())))


def test_a_gate_over_a_block() -> None:
    """The residual inside is a branch's layer; it goes first, then the block around it."""
    model = prepared(*stem(), Residual(nn.Sequential(basic(6), Squeeze(6), *conv_bn(6, 6)), None, nn.ReLU()))
    assert len(removed(model).removed) == 2


def test_a_shape_read_elsewhere() -> None:
    """The gate cannot go, for its size nodes are read by what stays."""

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.squeeze = nn.Sequential(*conv_bn(6, 6)), LinearSqueeze(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return (self.squeeze(y) + x) * y.size(1)

    refused(prepared(*stem(), Elsewhere()), "read elsewhere")


OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a number a pixel": (lambda y: y * torch.sigmoid(y.mean(1, keepdim=True)), "no gate that can be followed"),
    "every value": (lambda y: y * torch.tanh(y), "no gate that can be followed"),
    "another value's pool": (
        lambda y: y * torch.sigmoid(F.adaptive_avg_pool2d(2 * y, 1)),
        "no gate that can be followed",
    ),
    "channels mixed": (
        lambda y: y * torch.sigmoid(F.adaptive_avg_pool2d(y, 1).flip(1)),
        "no gate that can be followed",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_gate_is_refused(name: str) -> None:
    code, why = OTHERS[name]

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = branch(conv_bn(6, 6), conv_bn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x + code(self.body(x))

    refused(prepared(*stem(), Odd()), why)


class Next(nn.Module):
    """A block of ConvNeXt, with its layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(6, 6, 7, padding=3, groups=6), nn.LayerNorm(6)
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale = nn.Parameter(torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return x + y.mul(self.scale.reshape(1, -1, 1, 1))


def test_layer_norm_is_the_reason_and_layer_scale_no_gate() -> None:
    refused(prepared(*stem(), Next()), "LayerNorm, whose mean and variance are over all channels")
    reason = plan_removal(prepared(*stem(), Next()), images())[0].reason
    assert "gate" not in reason


class Ghost(nn.Module):
    """GhostNet's module: a 1x1 convolution, and a depthwise one of what it gives, side by side."""

    def __init__(self, inputs: int, outputs: int, act: type[nn.Module]) -> None:
        super().__init__()
        half = outputs // 2
        self.outputs = outputs
        self.first = nn.Sequential(*conv_bn(inputs, half, 1), act())
        self.cheap = nn.Sequential(*conv_bn(half, half, 3, groups=half), act())

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.cat([y, self.cheap(y)], dim=1)[:, : self.outputs, :, :]


@pytest.mark.parametrize("squeeze", [False, True])
def test_ghost_modules(squeeze: bool) -> None:
    """What a convolution makes stands beside what is made of it; the copies go by, as one part of the concatenation more."""
    middle = [Squeeze(8, nn.Hardsigmoid())] if squeeze else []
    body = nn.Sequential(Ghost(6, 8, nn.ReLU), *middle, Ghost(8, 6, nn.Identity))
    removal = removed(prepared(*conv_bn(3, 6), Residual(body)))
    gated = "gate+" if squeeze else ""
    assert removal.blocks[0].form == f"free+{gated}pair+slice" and cats(removal) == 2


def test_a_ghost_module_with_stride_and_a_shortcut_of_its_own() -> None:
    body = nn.Sequential(Ghost(6, 8, nn.ReLU), *conv_bn(8, 8, 3, 2, groups=8), Ghost(8, 10, nn.Identity))
    shortcut = nn.Sequential(*conv_bn(6, 6, 3, 2, groups=6), *conv_bn(6, 10, 1))
    removed(prepared(*stem(), Residual(body, shortcut)))


def test_a_crop_that_takes_all_at_this_size_alone() -> None:
    class Crop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :6, :8, :8]

    model = prepared(*stem(), Crop(), basic(6), nn.AdaptiveAvgPool2d(1))
    removal = remove_residuals(model, images())
    assert worst_error(removal, model, size=11) < 1e-11


WRITTEN: dict[str, tuple[Callable[[Tensor], Tensor], type[nn.Module]]] = {
    "divided": (lambda x: F.relu6(x + 3.0) / 6.0, nn.Hardsigmoid),
    "multiplied": (lambda x: (3 + x).clamp(0, 6) * (1 / 6), nn.Hardsigmoid),
    "hard swish": (lambda x: x * (F.relu6(x + 3) / 6), nn.Hardswish),
    "swish": (lambda x: torch.sigmoid(x) * x, nn.SiLU),
    "by five": (lambda x: F.relu6(x + 3) / 5, nn.ReLU6),
    "another's": (lambda x: torch.sigmoid(x) * (2 * x), nn.Sigmoid),
}


class Written(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.code = WRITTEN[name][0]

    def forward(self, x: Tensor) -> Tensor:
        return self.code(x)


@pytest.mark.parametrize("name", WRITTEN)
def test_activations_written_out_are_named(name: str) -> None:
    network = normalise(nn.Sequential(nn.Conv2d(3, 4, 1), Written(name)).double(), (images(),))
    kinds = {type(network.layer(node)) for node in network.graph.nodes}
    assert WRITTEN[name][1] in kinds
    assert len(kinds & {nn.Hardsigmoid, nn.Hardswish, nn.SiLU}) == (name not in ("by five", "another's"))


def test_a_block_of_a_mobilenet_v3_as_code_on_the_web_has_it() -> None:
    swish = Written("hard swish")
    body = nn.Sequential(
        *conv_bn(4, 8, 1), swish, *conv_bn(8, 8, 3, groups=8), Squeeze(8, Written("divided")), swish, *conv_bn(8, 4, 1)
    )
    removal = removed(prepared(*conv_bn(3, 4), Residual(body)))
    assert removal.blocks[0].form == "gate+pair+shift"


SHORTCUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros_like": lambda x: torch.cat([x, torch.zeros_like(x)], 1),
    "mul": lambda x: torch.cat((x, x.mul(0)), dim=1),
    "new_zeros": lambda x: torch.cat((x, x.new_zeros(x.size(0), 6, x.size(2), x.size(3))), 1),
    "both sides": lambda x: torch.cat([0 * x[:, :3], x, torch.zeros_like(x[:, :3])], -3),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_channels_of_zeros_beside_the_input(name: str) -> None:
    """The shortcut of ResNets for CIFAR is a strided Dirac convolution, and the result a chain (RM.md 3)."""

    class Halve(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return SHORTCUTS[name](x[:, :, ::2, ::2])

    block = Residual(branch(conv_bn(6, 12, stride=2), conv_bn(12, 12)), Halve(), nn.ReLU())
    removal = removed(prepared(*stem(), block))
    assert isinstance(removal.model, nn.Sequential) and removal.blocks[0].form == "free"
