"""What the sizes of the inputs decide is traced; what values decide is refused with module and line (cases 26, 31, README's list)."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import rmprune
from rmprune.errors import UnsupportedModel
from rmprune.graph.fx_tracer import Tracer
from rmprune.graph.listed import trace
from rmprune.graph.tracing import follow, warn_of_left_out

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))
Join = Callable[[Tensor, Tensor], Tensor]


class Res(nn.Module):
    def __init__(self, join: Join, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.conv, self.head, self.join = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 2, 1),
            join,
        )
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor, double: bool = False, mask: Tensor | None = None) -> Tensor:
        y = torch.relu(self.stem(x))
        if double:
            y = y * 2
        if mask is not None:
            y = y * mask
        return self.head(torch.relu(self.join(y, self.norm(self.conv(y)))))  # type: ignore[no-any-return]


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Buffer(torch.rand(1, 8, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def by_size(a: Tensor, b: Tensor) -> Tensor:
    return a + b if a.shape[2] > 4 else b


def asserted(a: Tensor, b: Tensor) -> Tensor:
    n, c, h, w = a.shape
    if h != w or len(a.shape) != 4 or a.dim() != 4:
        raise ValueError("square maps only")
    return a + b.view(n, c, int(h), w).relu() if max(h, w) < 4 else a + b


def by_channels(a: Tensor, b: Tensor) -> Tensor:
    return a + b if a.shape[1] == b.size(1) else b


def extended(a: Tensor, b: Tensor) -> Tensor:
    pieces = list(b.chunk(2, 1))
    pieces.extend(a.chunk(2, dim=1))
    return torch.cat(pieces[:2], 1) + torch.cat(pieces[2:], 1)


def split_by_width(a: Tensor, b: Tensor) -> Tensor:
    return a + torch.cat(list(b.split(4, 1)), 1)


def split_by_widths(a: Tensor, b: Tensor) -> Tensor:
    return a + torch.cat(list(b.split([2, 6], 1)), 1)


def unbound(a: Tensor, b: Tensor) -> Tensor:
    return a + torch.stack(list(b.unbind(1)), 1)


def by_value(a: Tensor, b: Tensor) -> Tensor:
    return a + b if a.mean() > 0 else b


REMOVED: dict[
    str, tuple[Join, nn.Module | None, bool]
] = {  # how it joins, its norm, whether it holds for these sizes only
    "sum": (lambda a, b: sum([a, b]), None, False),  # type: ignore[arg-type, return-value]
    "detached": (lambda a, b: a.detach() + b, None, False),
    "scale and shift": (torch.add, Affine(), False),
    "difference": (torch.sub, None, False),
    "- of Python": (lambda a, b: a - b, None, False),
    "by size": (by_size, None, True),
    "asserted": (asserted, None, True),
    "by channels": (by_channels, None, False),
}


@pytest.mark.parametrize("kind", REMOVED)
def test_joins_are_removed(kind: str) -> None:
    join, norm, sized = REMOVED[kind]
    net = Res(join, norm).eval()
    removal = rmprune.remove_residuals(net, X)
    assert len(removal.removed) == 1 and torch.allclose(removal.model(X), net(X), atol=1e-4)
    assert sized == ("inputs of these sizes only" in removal.note)
    if sized:
        assert "test_tracing.py line" in removal.note


class Cifar(nn.Module):
    """A block that doubles its channels, with a shortcut of zeros."""

    def __init__(self, zeros: Callable[[Tensor], Tensor], first: bool) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.zeros, self.first = nn.Conv2d(8, 2, 1), zeros, first

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        short = x[:, :, ::2, ::2]
        zeros = self.zeros(short)
        short = torch.cat([zeros, short], dim=1) if self.first else torch.cat((short, zeros), 1)
        return self.head(torch.relu(self.two(torch.relu(self.one(x))) + short))  # type: ignore[no-any-return]


ZEROS: dict[str, Callable[[Tensor], Tensor]] = {
    "mul": lambda x: x.mul(0),
    "times": lambda x: 0 * x,
    "like": torch.zeros_like,
    "new": lambda x: x.new_zeros(x.shape),
    "made": lambda x: torch.zeros(x.size(0), 4, x.size(2), x.size(3), dtype=x.dtype),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ZEROS)
def test_a_shortcut_of_zeros_is_removed(kind: str, first: bool) -> None:
    net = Cifar(ZEROS[kind], first).eval()
    removal = rmprune.remove_residuals(net, X)
    assert len(removal.removed) == 1 and torch.allclose(removal.model(X), net(X), atol=1e-4)


def test_a_batch_size_that_is_written_in_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"size of the batch is written into the network"):
        rmprune.remove_residuals(Cifar(lambda x: x.reshape(int(x.size(0)), 4, 4, 4), True).eval(), X)


@pytest.mark.parametrize("join", [extended, split_by_width, split_by_widths, unbound])
def test_pieces_of_a_fixed_number_are_traced(join: Join, tmp_path: Path) -> None:
    """They are no chain of layers, which removal says; pruning and artifacts take them."""
    net = Res(join).eval()
    with pytest.raises(UnsupportedModel, match="no residual to remove that can go"):
        rmprune.remove_residuals(net, X)
    saved = rmprune.load(rmprune.save(net, tmp_path / "net", example_inputs=X))
    assert torch.equal(saved(X), net(X))
    if join in (extended, split_by_widths):
        assert torch.equal(rmprune.load(rmprune.save(net, tmp_path / "plain"))(X), net(X))


def test_values_that_decide_are_refused_with_module_and_line(tmp_path: Path) -> None:
    net = nn.Sequential(Res(by_value)).eval()
    said = r"0 \(Res\), test_tracing.py line \d+, `return a \+ b if a.mean\(\) > 0 else b`.*depends on the values of tensors"
    for call in (rmprune.remove_residuals, rmprune.plan_removal):
        with pytest.raises(UnsupportedModel, match=said):
            call(net, X)
    with pytest.raises(UnsupportedModel, match=said):
        rmprune.save(net, tmp_path / "net", example_inputs=X)


def test_an_error_of_the_network_is_not_called_control_flow() -> None:
    def broken(a: Tensor, b: Tensor) -> Tensor:
        return (
            a + b
            if isinstance(a, nn.Parameter) or not hasattr(a, "as_subclass")
            else a + b
            if a.sum() is None
            else {}["key"]
        )  # type: ignore

    with pytest.raises(UnsupportedModel, match=r"KeyError"):
        rmprune.remove_residuals(Res(broken).eval(), X)


def test_sizes_that_decide_need_example_inputs_in_an_artifact(tmp_path: Path) -> None:
    net = Res(by_size).eval()
    with pytest.raises(UnsupportedModel, match="give example_inputs"):
        rmprune.save(net, tmp_path / "net")
    assert torch.equal(rmprune.load(rmprune.save(net, tmp_path / "net", example_inputs=X))(X), net(X))


class Star(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Res(torch.add)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(inputs[0]) + inputs[1].mean()  # type: ignore[no-any-return]


def test_inputs_without_names() -> None:
    net = Star().eval()
    removal = rmprune.remove_residuals(net, (X, X))
    assert removal.removed and torch.allclose(removal.model(X, X), net(X, X), atol=1e-4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru = nn.Conv2d(3, 8, 3), nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.conv(x).mean(2).transpose(1, 2))[0]  # type: ignore[no-any-return]


def test_layers_that_an_artifact_cannot_hold_are_named_and_measured(tmp_path: Path) -> None:
    net = Recurrent().eval()
    with pytest.raises(UnsupportedModel, match=r"^layer gru \(GRU\): not a layer type"):
        rmprune.save(net, tmp_path / "net")
    assert rmprune.measure_latency(net, X, backend="eager", seconds=0.0, min_rounds=1).median_ms > 0


def test_frozen_batch_norm_is_saved(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3)).eval()
    assert torch.equal(rmprune.load(rmprune.save(net, tmp_path / "net"))(X), net(X))


class Written(nn.Module):
    """x + gamma.view(...) * f(x), an entry of a map set, a free buffer called as torch calls a mean, and arguments nobody gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.gamma, self.mean = nn.Parameter(torch.rand(8)), nn.Buffer(torch.rand(3))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor, *more: Tensor, **others: Tensor) -> Tensor:
        y = torch.relu(self.stem(x - self.mean[:, None, None].expand(3, *X.shape[2:])))
        y = y + self.gamma.view(1, -1, 1, 1) * self.conv(y)
        z = torch.relu(self.last(y))
        z[..., 0] = 0
        z[:, :, 1] *= 2
        return self.head(sum((z, *more)).mean((2, 3)))  # type: ignore[no-any-return, union-attr]


def test_a_view_that_is_changed_and_put_elsewhere_is_refused() -> None:
    def join(x: Tensor, y: Tensor) -> Tensor:
        both = x + y
        part = both[:, 4:]
        part *= 2
        both[:, :4] = part
        return both

    with pytest.raises(UnsupportedModel, match="changes add in place through a view"):
        rmprune.prune(Res(join).eval(), X, importance="magnitude", budget=rmprune.Budget(macs_ratio=0.6))


class Masked(nn.Module):
    """A transformer with a mask, which torch.fx does not go into, behind a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Res(torch.add), nn.Flatten(2))
        self.end = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 16, batch_first=True), 1)

    def forward(self, x: Tensor, empty: Tensor | None = None) -> Tensor:
        if empty is not None:
            return self.end(self.stem(x), src_key_padding_mask=empty)  # type: ignore[no-any-return]
        mask = nn.Transformer.generate_square_subsequent_mask(2)
        return self.end(self.stem(x), mask=mask, is_causal=True)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_a_transformer_that_cannot_be_gone_into_is_one_layer() -> None:
    net = Masked().double().eval()
    removal = rmprune.remove_residuals(net, X.double())
    assert removal.removed == ["stem.0"] and torch.allclose(removal.model(X.double()), net(X.double()), atol=1e-12)
    with pytest.raises(UnsupportedModel, match="nested_tensor"):  # of several lengths
        rmprune.remove_residuals(net, (X.double(), torch.tensor([[False, True], [False, False]])))


def test_what_code_writes_of_parameters_and_into_maps_is_read() -> None:
    net = Written().double().eval()
    removal = rmprune.remove_residuals(net, X.double())
    assert len(removal.removed) == 1 and torch.allclose(removal.model(X.double()), net(X.double()), atol=1e-12)
    pruned = rmprune.prune(net, X.double(), importance="magnitude", budget=rmprune.Budget(macs_ratio=0.999))
    assert pruned.head[0].out_features < 8 and pruned.rmprune_facts["cut_error"] < 1e-9


class Forwarding(nn.Module):
    """Finds its layer's attributes as its own, as wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 2.0))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.conv, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.conv2d(x, self.weight, self.bias)


class Named(nn.Sequential):
    """Says where its attributes are looked up, for a type checker's sake."""

    __getattr__ = nn.Module.__getattr__


@pytest.mark.parametrize(
    ("make", "read"), [(Forwarding, ["conv.bias", "conv.weight", "scale"]), (nn.Sequential, []), (Named, [])]
)
def test_classes_are_left_as_they_were(make: Callable[..., nn.Module], read: list[str]) -> None:
    """While a network is traced, parameters are looked up in a way of torch.fx's own: on classes of the network, or on nn.Module."""
    model = make() if read else make(nn.Conv2d(3, 4, 1), nn.ReLU())
    kinds = (nn.Module, Res, *{type(module) for module in model.modules()})
    before = [dict(vars(kind)) for kind in kinds]
    graph = trace(model)
    assert [dict(vars(kind)) for kind in kinds] == before
    assert sorted(node.target for node in graph.nodes if node.op == "get_attr") == read
    with pytest.raises(UnsupportedModel):
        trace(Res(lambda a, b: a if a.sum() > 0 else b))
    assert [dict(vars(kind)) for kind in kinds] == before


class OwnCall(nn.Conv2d):
    __module__ = nn.__name__

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@pytest.mark.parametrize("own", [False, True])
def test_layers_that_are_called_in_ways_of_their_own_are_layers_of_the_graph(own: bool) -> None:
    net = Res(torch.add).eval()
    if own:
        net.conv = OwnCall(8, 8, 3, padding=1)
    else:
        net.conv.compile()
    assert {"stem", "conv", "head"} <= {
        str(node.target) for node in follow(Tracer, net)[0].nodes if node.op == "call_module"
    }


AUTOCASTS: list[Callable[[Tensor], Any]] = [
    lambda x: torch.autocast("cpu", dtype=torch.bfloat16),
    lambda x: torch.autocast(x.device.type),
    lambda x: torch.amp.autocast(device_type=x.device.type, enabled=True),
    lambda x: torch.autocast("cpu", enabled=False),
    lambda x: torch.autocast(x.device.type, enabled=False),
]


class Cast(nn.Module):
    def __init__(self, begin: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.begin, self.res = begin, Res(torch.add)

    def forward(self, x: Tensor) -> Tensor:
        with self.begin(x):
            return self.res(x)


class Decorated(Cast):
    @torch.autocast("cpu")
    def forward(self, x: Tensor) -> Tensor:
        return self.res(x)


@pytest.mark.parametrize(
    ("net", "on"),
    [*((Cast(begin), place < 3) for place, begin in enumerate(AUTOCASTS)), (Decorated(AUTOCASTS[0]), True)],
)
def test_an_autocast_that_is_left_out_is_said(
    net: nn.Module, on: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    warn_of_left_out.cache_clear()
    before = dict(vars(torch.autocast))
    removal = rmprune.remove_residuals(net.eval(), X)
    said = [entry.getMessage() for entry in caplog.records if "autocast in forward is left out" in entry.getMessage()]
    assert len(said) == on == ("autocast" in removal.note) and dict(vars(torch.autocast)) == before
    caplog.clear()
    budget = rmprune.Budget(ratio=0.5)
    pruned = rmprune.prune(net, X, importance="magnitude", budget=budget)  # of the same class, which enters it
    assert type(pruned) is type(net) and not caplog.records
    with pytest.raises(UnsupportedModel, match="enters autocast, which a file") if on else contextlib.nullcontext():
        rmprune.save(net, tmp_path / "net", example_inputs=X)
    assert (tmp_path / "net").exists() != on


FROZEN: list[Callable[[], Any]] = [
    torch.no_grad,
    torch.inference_mode,
    lambda: torch.set_grad_enabled(False),
    torch.enable_grad,
    lambda: torch.set_grad_enabled(True),
]


class Frozen(Res):
    """Its stem is trained only where `begin` leaves gradients on."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        super().__init__(torch.add)
        self.begin = begin

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        with self.begin():
            x = torch.relu(self.stem(x))
        return self.head(self.conv(x) + x)


class DecoratedStem(Frozen):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.begun(x)
        return self.head(self.conv(x) + x)

    @torch.no_grad()
    def begun(self, x: Tensor) -> Tensor:
        return torch.relu(self.stem(x))


class Detached(Frozen):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = torch.relu(self.stem(x)).detach()
        return self.head(self.conv(x) + x)


class DetachedInput(Frozen):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = torch.relu(self.stem(x.detach() - 0.5))
        return self.head(self.conv(x) + x)


class SizesApart(Frozen):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        with self.begin():
            x = 2 * x
        x = torch.relu(self.stem(x))
        with self.begin():
            size = (x.shape[0], x.size(1) * 1, *x.shape[2:])
        return self.head((self.conv(x) + x).reshape(size))


class DetachedInPlace(Detached):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = torch.relu(self.stem(x))
        x.detach_()
        return self.head(self.conv(x) + x)


def test_detaching_in_place_is_kept() -> None:
    removal = rmprune.remove_residuals(DetachedInPlace(torch.no_grad).eval(), X)
    removal.model(X).sum().backward()
    trained = {name.split(".")[0] for name, value in removal.model.named_parameters() if value.grad is not None}
    assert "head" in trained and "stem" not in trained and "stopped" not in removal.note


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("net", "off"),
    [
        *((Frozen(begin), place < 3) for place, begin in enumerate(FROZEN)),
        (DecoratedStem(torch.no_grad), True),
        (Detached(torch.no_grad), True),
        (DetachedInput(torch.no_grad), False),
        (SizesApart(torch.no_grad), False),
    ],
)
def test_gradients_that_the_result_does_not_stop_are_said(
    net: Frozen, off: bool, around: Callable[[], Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    warn_of_left_out.cache_clear()
    with around():
        removal = rmprune.remove_residuals(net.eval(), X)
        said = [entry.getMessage() for entry in caplog.records if "forward stops gradients (" in entry.getMessage()]
        assert len(said) == off == ("gradients that forward stops are not stopped (" in removal.note)
        assert not off or "test_tracing.py line" in said[0]
        caplog.clear()
        pruned = rmprune.prune(net, X, importance="magnitude", budget=rmprune.Budget(ratio=0.5))
        assert type(pruned) is type(net) and not caplog.records
    if not isinstance(net, Detached | DetachedInput):  # which a file cannot hold
        warn_of_left_out.cache_clear()
        rmprune.save(net, tmp_path / "net", example_inputs=X)
        assert len(caplog.records) == off


class PassedOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Res(torch.add)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside(*args, **kwargs)


def test_a_wrapper_that_passes_on_what_it_is_given_is_followed() -> None:
    net, x = PassedOn().eval(), torch.randn(2, 3, 8, 8)
    plain = rmprune.remove_residuals(net, x)
    assert plain.removed and torch.allclose(plain.model(x), net(x), atol=1e-5)
