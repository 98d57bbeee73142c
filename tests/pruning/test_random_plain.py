"""Property of pruning: random plain networks meet random budgets within random limits, or the limit that forbids it is named and does.

`RMPRUNE_PROPERTY_DRAWS=5000 pytest -n 0 --hypothesis-seed=0 tests/pruning/test_random_plain.py` draws as many; the default ends in seconds.
Each result is saved and loaded, bit for bit, and exported and run in ONNX Runtime (of the default ones one of twenty).
"""

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from marks import draws
from torch import nn

import rmprune
from rmprune.errors import InfeasibleBudget
from rmprune.pruning import Budget

ASKED = os.environ.get("RMPRUNE_PROPERTY_DRAWS")
DRAWS = int(ASKED or draws(10, 5))
ACTS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky": nn.LeakyReLU,
    "none": nn.Identity,
}


@dataclass(frozen=True)
class Layer:
    """A convolution (a linear layer, where `kernel` is 0) and what follows it; `depthwise`: one more, of as many channels."""

    width: int
    kernel: int
    act: str
    norm: bool
    stride: int = 1
    depthwise: bool = False
    pool: bool = False


@dataclass(frozen=True)
class Plain:
    layers: tuple[Layer, ...]
    size: int
    flat: bool
    seed: int

    def build(self, widths: list[int]) -> nn.Sequential:
        """With these widths, in place of the layers' own; weights from the seed."""
        torch.manual_seed(self.seed)
        parts: list[nn.Module] = []
        channels, side = 2, self.size
        spatial = True
        for layer, width in zip(self.layers, widths, strict=True):
            if layer.kernel and spatial:
                parts.append(
                    nn.Conv2d(channels, width, layer.kernel, layer.stride, layer.kernel // 2, bias=not layer.norm)
                )
                side = (side - 1) // layer.stride + 1
            else:
                if spatial:
                    parts += [nn.Flatten()] if self.flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
                    channels *= side * side if self.flat else 1
                parts.append(nn.Linear(channels, width))
                spatial = False
            if layer.norm:
                parts.append(nn.BatchNorm2d(width) if spatial else nn.BatchNorm1d(width))
            parts.append(ACTS[layer.act]())
            if layer.depthwise and spatial:
                parts.append(nn.Conv2d(width, width, 3, 1, 1, groups=width))
            if layer.pool and spatial and side > 1:
                parts.append(nn.MaxPool2d(2))
                side //= 2
            channels = width
        if spatial:
            parts += [nn.Flatten()] if self.flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            channels *= side * side if self.flat else 1
        model = nn.Sequential(*parts, nn.Linear(channels, 3))
        for module in model:
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.1, 2)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.1, 3)
        return model.eval()


def own_widths(model: nn.Module, whole: nn.Module) -> list[int]:
    """Of the layers that can be pruned: all but depthwise ones of the `whole` network, which follow, and the head."""
    layers = [
        m
        for m, w in zip(model, whole, strict=True)
        if isinstance(w, nn.Conv2d | nn.Linear) and getattr(w, "groups", 1) == 1
    ]
    return [m.out_channels if isinstance(m, nn.Conv2d) else m.out_features for m in layers[:-1]]


def allowed(whole: int, budget: Budget) -> list[int]:
    """The widths that the limits leave a layer."""
    low = max(budget.min_channels, math.ceil(budget.min_fraction * whole - 1e-9))
    high = max(low, math.floor(budget.max_fraction * whole + 1e-9))
    widths = range(budget.round_to, whole + 1, budget.round_to)
    return [width for width in widths if low <= width <= high] or [whole]


def cost(model: nn.Module, whole: nn.Module, x: torch.Tensor, budget: Budget) -> float:
    """Channels or MACs, whatever the budget counts."""
    return sum(own_widths(model, whole)) if budget.ratio is not None else rmprune.count_macs(model, x)


@st.composite
def plains(draw: st.DrawFn) -> Plain:
    def layer(kernel: int) -> Layer:
        odd = st.sampled_from([False, False, False, True])
        return Layer(
            draw(st.integers(2, 12)), kernel, draw(st.sampled_from(sorted(ACTS))), draw(st.booleans()),
            draw(st.sampled_from([1, 1, 2])), draw(odd), draw(odd),
        )  # fmt: skip

    layers = [layer(draw(st.sampled_from([1, 3]))) for _ in range(draw(st.integers(1, 4)))]
    layers += [layer(0) for _ in range(draw(st.integers(0, 2)))]
    return Plain(tuple(layers), draw(st.integers(4, 8)), draw(st.booleans()), draw(st.integers(0, 10**6)))


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    name, value = draw(st.sampled_from(["ratio", "macs_ratio"])), draw(st.floats(0.05, 0.95))
    low = draw(st.sampled_from([0.0, 0.0, 0.2, 0.5]))
    high = draw(st.sampled_from([1.0, 1.0, 0.8, 0.6]))
    return Budget(
        **{name: value},
        min_channels=draw(st.integers(1, 3)),
        min_fraction=low,
        max_fraction=high,
        round_to=draw(st.sampled_from([1, 1, 2, 4])),
    )


def check(plain: Plain, budget: Budget, importance: str, which: str) -> str:
    """Prunes and checks every promise; what happened, in a word."""
    whole = [layer.width for layer in plain.layers]
    model, x = plain.build(whole), torch.randn(2, 2, plain.size, plain.size, generator=torch.Generator().manual_seed(1))
    choices = [allowed(width, budget) for width in whole]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    limit = cost(model, model, x, budget) * (budget.macs_ratio or 1 - (budget.ratio or 0)) + 1e-6
    try:
        pruned = rmprune.prune(model, x, budget=budget, importance=importance, which=which)
    except InfeasibleBudget as error:
        least = cost(plain.build([min(choice) for choice in choices]), model, x, budget)
        assert which == "uniform" or least > limit, f"refused, though {least} of {limit} can be had: {error}"
        named = [
            n
            for n in ("round_to", "min_channels", "min_fraction", "max_fraction", "one channel a layer")
            if n in str(error)
        ]
        assert named, f"no limit is named: {error}"
        return "infeasible"
    finally:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
            "the argument changed"
        )
    left = own_widths(pruned, model)
    assert all(n in choice for n, choice in zip(left, choices, strict=True)), (
        f"{left} left of {whole}, allowed {choices}"
    )
    assert cost(pruned, model, x, budget) <= limit, f"{cost(pruned, model, x, budget)} over {limit}"
    expected = pruned(x)
    assert expected.shape == (2, 3) and bool(expected.isfinite().all())
    with tempfile.TemporaryDirectory() as folder:
        export = bool(ASKED) or plain.seed % 20 == 0
        path = rmprune.save(pruned, Path(folder) / "net", example_inputs=x[:1] if export else None)
        assert torch.equal(rmprune.load(path)(x), expected), "it came back changed"
        if export:
            session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x[:1].numpy()})[0])
            assert (found - expected[:1]).abs().max() <= 1e-4 * max(1.0, float(expected.detach().abs().max()))
    return "exported" if export else "pruned"


@settings(
    max_examples=DRAWS, deadline=None, derandomize=not ASKED, database=None, suppress_health_check=list(HealthCheck)
)
@given(plains(), budgets(), st.sampled_from(["magnitude", "random"]), st.sampled_from(["free", "free", "uniform"]))
def test_budgets_are_met_within_their_limits(plain: Plain, budget: Budget, importance: str, which: str) -> None:
    event(check(plain, budget, importance, which))


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Plain((Layer(8, 3, "relu", True),), 4, False, 0)
    monkeypatch.setattr(rmprune, "prune", lambda model, *_, **__: model)
    with pytest.raises(AssertionError, match=r"over|left of"):
        check(plain, Budget(ratio=0.5), "magnitude", "free")
