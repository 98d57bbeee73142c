"""Networks as people bring them: wrapped, with computed weights, of another kind, and inputs that do not fit (cases 11, 15, 20, 22, 28)."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from marks import long
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import rmprune
from rmprune.errors import UnsupportedModel
from rmprune.graph.foreign import plain_module
from rmprune.pruning import prune_coupled


class Res(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        return self.head(torch.relu(y + self.conv(y)))  # type: ignore[no-any-return]


BUDGET = rmprune.Budget(macs_ratio=0.6)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, Callable[[Any, Any, Path], Any]] = {
    "remove_residuals": lambda net, x, _: rmprune.remove_residuals(net, x),
    "plan_removal": lambda net, x, _: rmprune.plan_removal(net, x),
    "prune": lambda net, x, _: rmprune.prune(net, x, importance="magnitude", budget=BUDGET),
    "coupled": lambda net, x, _: prune_coupled(net, x, importance="magnitude", budget=BUDGET),
    "count_macs": lambda net, x, _: rmprune.count_macs(net, x),
    "measure_latency": lambda net, x, _: rmprune.measure_latency(net, x, backend="eager", seconds=0.0, min_rounds=1),
    "save": lambda net, x, path: rmprune.save(net, path / "net", example_inputs=x),
}

MORE = {
    **{name: CALLS[name] for name in ("remove_residuals", "plan_removal", "coupled", "save")},
    "unproved": lambda net, x, _: rmprune.prune(net, x, importance="magnitude", budget=BUDGET, prove=False),
    "collapse": lambda net, x, _: rmprune.collapse_blocks(net, x),
    "Pruner": lambda net, x, _: rmprune.Pruner(net, x, BUDGET, optimizer=torch.optim.SGD(net.parameters()), steps=1),
    "slim": lambda net, x, _: rmprune.slim(
        net, [x], [x], macs_ratio=0.6, loss=lambda model, batch: model(batch).square().mean()
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch announces the end of what is tried here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def averaged(net: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(net)


def compiled_inside(net: nn.Module) -> nn.Module:
    net.conv = torch.compile(net.conv)
    return net


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, averaged, long(lambda net: torch.compile(nn.DataParallel(net))), compiled_inside],
)
def test_wrappers_are_taken_off(wrap: Any, call: str, tmp_path: Path) -> None:
    assert CALLS[call](wrap(Res()).eval(), X, tmp_path)


def test_distributed_data_parallel_is_taken_off(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(Res().eval())
        assert set(rmprune.load(rmprune.save(net, tmp_path / "net")).state_dict()) == set(Res().state_dict())
        assert rmprune.remove_residuals(net, X).removed and rmprune.count_macs(net, X) == rmprune.count_macs(Res(), X)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("call", CALLS)
def test_a_network_compiled_in_place_is_taken_and_not_compiled(call: str, tmp_path: Path) -> None:
    net = Res().eval()
    net.compile()
    compiled = net._compiled_call_impl = lambda *_: pytest.fail("it was compiled, which takes many seconds")
    assert CALLS[call](net, X, tmp_path) and net._compiled_call_impl is compiled


class Shared(nn.Module):
    """One norm after both convolutions, or one kernel in both."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.one, self.two, self.head = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 3), (3, 3), (3, 2)))
        self.norm_one = self.norm_two = nn.BatchNorm2d(3)
        if not norm:
            self.two.weight, self.norm_two = self.one.weight, nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm_one(self.one(x)))
        return self.head(torch.relu(self.norm_two(self.two(y)) + y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("norm", [True, False])
def test_what_is_shared_is_followed_or_refused_by_name(norm: bool, tmp_path: Path) -> None:
    net = Shared(norm).eval()
    assert torch.allclose(rmprune.remove_residuals(net, X).model(X), net(X), atol=1e-5)
    assert torch.equal(rmprune.load(rmprune.save(net, tmp_path / "net"))(X), net(X))
    if norm:
        pruned = rmprune.prune(net, X, importance="magnitude", budget=rmprune.Budget(macs_ratio=0.5))
        assert pruned.norm_one is pruned.norm_two and pruned(X).shape == net(X).shape
        return
    with pytest.raises(UnsupportedModel, match="two: it shares a tensor with one"):
        rmprune.prune(net, X, importance="magnitude", budget=rmprune.Budget(macs_ratio=0.5))


def test_wrappers_inside_are_taken_off_in_a_copy() -> None:
    net = nn.Sequential(nn.DataParallel(Res()), nn.ReLU()).eval()
    plain = plain_module(net)
    assert torch.equal(plain(X), net(X)) and type(plain[0]) is Res and type(net[0]) is nn.DataParallel  # type: ignore[index]


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "l1_unstructured": lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
    "ln_structured twice": lambda conv: prune.random_unstructured(
        prune.ln_structured(conv, "weight", 0.3, 2, 0), "weight", 0.2
    ),
    "a bias": lambda conv: prune.l1_unstructured(conv, "bias", 0.3),
}


@pytest.mark.parametrize("kind", ["StdConv2d", "ScaledStdConv2d", "StdConv2dSame", "ScaledStdConv2dSame"])
def test_standardised_weights_are_made_permanent_as_they_compute(kind: str, caplog: Any) -> None:
    torch.manual_seed(0)
    layer = getattr(pytest.importorskip("timm.layers"), kind)
    net = nn.Sequential(layer(3, 8, 3, stride=2), nn.ReLU(), layer(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            tensor.add_(torch.rand_like(tensor) if "gain" in name else 0.1)
    plain = plain_module(net)
    assert torch.equal(plain(X), net(X)) and not any("gain" in name for name in plain.state_dict())
    with caplog.at_level(logging.WARNING, logger="rmprune"):
        pruned = rmprune.prune(net, X, importance="magnitude", budget=rmprune.Budget(ratio=0.5))
    assert pruned[0].out_channels + pruned[2].out_channels == 7 and "standardisation" in caplog.text  # type: ignore[index,operator]


@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed_are_made_permanent_and_said_once(kind: str, tmp_path: Path, caplog: Any) -> None:
    torch.manual_seed(0)
    net = Res()
    for conv in (net.stem, net.conv):
        COMPUTED[kind](conv)
    expected = net.eval()(X)
    names = set(net.state_dict())
    plain = plain_module(net)
    assert torch.allclose(plain(X), expected, atol=1e-6)
    assert set(plain.state_dict()) == set(Res().state_dict()) and set(net.state_dict()) == names
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rmprune"):
        pruned = CALLS["prune"](net, X, tmp_path)
    assert [r.getMessage()[-18:] for r in caplog.records if "permanent" in r.getMessage()] == ["e copy: stem, conv"]
    assert rmprune.count_params(pruned) < rmprune.count_params(plain)
    assert torch.allclose(rmprune.load(rmprune.save(net, tmp_path / "whole"))(X), expected, atol=1e-6)
    assert torch.allclose(rmprune.remove_residuals(net, X).model(X), expected, atol=1e-5)
    assert torch.equal(net(X), expected)


@pytest.mark.parametrize("call", MORE)
def test_what_changes_a_layer_from_outside_is_refused_at_every_entry(call: str, tmp_path: Path) -> None:
    hooked, replaced = Res().eval(), Res().eval()
    hooked.conv.register_forward_pre_hook(lambda _, args: (args[0].flip(1),))
    forward = replaced.conv.forward
    replaced.conv.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]
    for net, said in ((hooked, "hook"), (replaced, r"^conv \(Conv2d\): its forward was replaced")):
        with pytest.raises(UnsupportedModel, match=said):
            MORE[call](net, X, tmp_path / "net")


def _qat() -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    net = Res().train()
    net.qconfig = get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return prepare_qat(net)  # type: ignore[no-any-return]


def _dynamic() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Linear(8, 8)), {nn.Linear})  # type: ignore


def _subclassed() -> nn.Module:
    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs or {})

    net = Res()
    net.conv.register_buffer("scale", torch.ones(1).as_subclass(Own))
    return net


FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "script": (lambda: torch.jit.script(Res().eval()), "TorchScript"),
    "script inside": (
        lambda: nn.Sequential(torch.jit.script(Res().eval())),
        r"^0 \(RecursiveScriptModule\): TorchScript",
    ),
    "trace": (lambda: torch.jit.trace(Res().eval(), X), "TorchScript"),
    "exported": (lambda: torch.export.export(Res().eval(), (X,)), "ExportedProgram"),
    "exported module": (lambda: torch.export.export(Res().eval(), (X,)).module(), "exported operators"),
    "qat": (_qat, r"^stem \(Conv2d\): quantised"),
    "dynamic": (_dynamic, r"^1 \(Linear\): quantised"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()), r"^0.weight: a lazy layer"),
    "subclass": (_subclassed, r"^conv.scale: a Own"),
    "function": (lambda: torch.relu, "must be a torch.nn.Module"),
    "state dict": (lambda: Res().state_dict(), "must be a torch.nn.Module"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_kinds_of_module_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, said = FOREIGN[kind]
    net = make()
    for call in CALLS.values():
        with pytest.raises(UnsupportedModel, match=said):
            call(net, X, tmp_path)


def test_meta_weights_are_refused_where_values_are_needed_and_counted(tmp_path: Path) -> None:
    net = Res().to("meta").eval()
    assert rmprune.count_macs(net, X) == rmprune.count_macs(Res(), X)
    for name in ("remove_residuals", "prune", "save"):
        with pytest.raises(UnsupportedModel, match=r"stem.weight: on the meta device"):
            CALLS[name](net, X, tmp_path)


@pytest.mark.parametrize("call", CALLS)
def test_inference_tensors_are_taken(call: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        net, x = Res().eval(), torch.randn(2, 3, 8, 8)
    assert CALLS[call](net, x, tmp_path)


@pytest.mark.parametrize("call", ["remove_residuals", "prune", "coupled"])
def test_what_is_made_in_inference_mode_can_be_trained(call: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        made = CALLS[call](Res().eval(), X, tmp_path)
    getattr(made, "model", made)(X).sum().backward()


UNFIT: dict[str, tuple[Any, str]] = {
    "channels": (X[:, :1], r"stem \(Conv2d\) .*takes 3 channels"),
    "uint8": (X.byte(), r"stem \(Conv2d\) .*uint8: give example_inputs in float32"),
    "no batch": (X[0], "without a batch"),
    "sparse": (X.to_sparse(), "give a dense one"),
    "empty batch": (X[:0], "at least one example"),
    "list": ([X[0]], r"is a list.*torch.stack"),
    "numpy": (X.numpy(), r"is a ndarray.*torch.from_numpy"),
    "name": ({"y": X}, r"forward of Res takes x; there is no y and x is missing"),
    "none": (None, "is a NoneType"),
    "nothing": ((), "is empty"),
    "too many": ((X, X), "Res fails on inputs"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_inputs_that_do_not_fit_are_refused(kind: str) -> None:
    x, said = UNFIT[kind]
    for name in ("remove_residuals", "plan_removal", "prune", "count_macs"):
        with pytest.raises(UnsupportedModel, match=said):
            CALLS[name](Res().eval(), x, Path())
    assert isinstance(UNFIT["numpy"][0], numpy.ndarray)


def test_images_too_small_are_said_to_be() -> None:
    with pytest.raises(UnsupportedModel, match="too small for the network: layer 1"):
        rmprune.count_macs(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(8)), X)


def test_meta_inputs_are_refused_but_counted() -> None:
    assert rmprune.count_macs(Res(), X.to("meta")) == rmprune.count_macs(Res(), X)
    for name in ("remove_residuals", "prune"):
        with pytest.raises(UnsupportedModel, match="meta device"):
            CALLS[name](Res().eval(), X.to("meta"), Path())


@pytest.mark.parametrize("call", ["remove_residuals", "prune", "count_macs"])
def test_float64_images_are_taken(call: str) -> None:
    assert CALLS[call](Res().eval(), X.double(), Path())
