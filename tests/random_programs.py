"""Random residual networks beyond tests/random_networks.py: 1-D and 3-D, several inputs and outputs, one module in several blocks, values
under two names, linear residuals inside shortcuts in chains, gates that squeeze, concatenations inside blocks.

`Program` is a frozen dataclass, so that a failing draw prints as the code that builds it again: `ProgramNetwork(program)`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

STEPS = (
    "plain", "post", "linear", "chain", "deep", "gate", "scale_gate", "concat", "ghost", "shared", "alias", "trap", "project", "bare",
)  # fmt: skip
ACTS = ("relu", "relu6", "hardtanh", "leaky", "silu", "none")


@dataclass(frozen=True)
class Step:
    """One block: its kind, activation, whether batch norms follow its convolutions, and their kernel."""

    kind: str
    act: str = "relu"
    norm: bool = True
    kernel: int = 3


@dataclass(frozen=True)
class Program:
    """`rank`: spatial dimensions; `inputs` 1 or 2; `outputs` one tensor, a tuple, or a dict."""

    rank: int
    width: int
    size: int
    steps: tuple[Step, ...]
    inputs: int = 1
    outputs: str = "one"
    seed: int = 0

    def images(self, count: int, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        shape = (count, 2, *[self.size] * self.rank)
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(self.inputs))


def convolution(rank: int) -> type[nn.Module]:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]


def activation(name: str) -> nn.Module:
    made = {
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "hardtanh": lambda: nn.Hardtanh(-1.0, 2.0),
        "leaky": nn.LeakyReLU,
        "silu": nn.SiLU,
    }
    return made.get(name, nn.Identity)()


def layer(rank: int, before: int, width: int, step: Step, kernel: int | None = None) -> nn.Module:
    """A convolution that keeps the size, and its norm."""
    k = kernel or step.kernel
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    conv = convolution(rank)(before, width, k, padding=k // 2)
    return nn.Sequential(conv, norm(width)) if step.norm else conv


class BlockOf(nn.Module):
    """One step of a program on a map of `width` channels."""

    def __init__(self, step: Step, rank: int, width: int, shared: nn.Module) -> None:
        super().__init__()
        self.kind, self.rank, self.shared = step.kind, rank, shared
        self.act, self.inner_act = activation(step.act), activation("relu" if step.act == "none" else step.act)
        wide = 2 * width if step.kind in ("concat", "ghost") else width
        self.first, self.second = layer(rank, width, width, step), layer(rank, wide, width, step)
        self.along = nn.ModuleList(layer(rank, width, width, step, 1) for _ in range(2))
        self.squeeze, self.excite = convolution(rank)(width, 1, 1), convolution(rank)(1, width, 1)
        self.pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1](1)

    def gate(self, x: Tensor) -> Tensor:
        return self.excite(self.squeeze(self.pool(x)).relu()).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        inner = self.inner_act(self.first(x))
        if kind == "plain":
            return self.act(self.second(inner) + x)
        if kind == "post":
            return self.act(torch.add(x, self.act(self.second(inner))))
        if kind == "linear":
            return self.second(self.first(x)) + x
        if kind == "chain":
            x = self.first(x) + x
            return self.second(x) + x
        if kind == "deep":
            short = x + self.along[0](x)
            short = short + self.along[1](short)
            return self.act(self.second(inner) + short)
        if kind == "gate":
            y = self.second(inner)
            return self.act(y * self.gate(y) + x)
        if kind == "scale_gate":
            return self.act(self.second(inner) * self.gate(x) + x)
        if kind == "concat":
            return self.act(self.second(torch.cat([x, inner], 1)) + x)
        if kind == "ghost":
            return self.act(self.second(torch.cat([inner, self.along[0](inner)], 1)) + x)
        if kind == "shared":
            return self.act(self.shared(inner) + x)
        if kind == "alias":
            y = self.second(inner)
            z = y
            z += x
            return self.act(y)
        if kind == "trap":
            y = x
            y += self.second(inner)
            return self.act(x)
        if kind == "project":
            return self.act(self.second(inner) + self.along[0](x))
        return self.act(self.second(inner))


class ProgramNetwork(nn.Module):
    """The network of a program: float64, eval mode, weights and statistics from its seed."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        with torch.random.fork_rng():
            torch.manual_seed(program.seed)
            rank, width = program.rank, program.width
            self.stem, self.join = convolution(rank)(2, width, 3, padding=1), convolution(rank)(2, width, 1)
            shared = layer(rank, width, width, Step("shared"))
            self.blocks = nn.ModuleList(BlockOf(step, rank, width, shared) for step in program.steps)
            self.head = nn.Linear(width, 2)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                    nn.init.normal_(module.weight, 0.5)
                    nn.init.normal_(module.bias)
                    nn.init.normal_(module.running_mean)
                    nn.init.uniform_(module.running_var, 0.1, 3)
        self.double().eval()

    def forward(self, x: Tensor, second: Tensor | None = None) -> Any:
        x = self.stem(x).relu()
        if self.program.inputs == 2:
            x = x + self.join(second)
        middle = x
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 0:
                middle = x
        y = self.head(x.flatten(2).mean(2))
        if self.program.outputs == "one":
            return y
        return (y, middle) if self.program.outputs == "tuple" else {"classes": y, "map": middle}


@st.composite
def programs(draw: st.DrawFn) -> Program:
    step = st.builds(Step, st.sampled_from(STEPS), st.sampled_from(ACTS), st.booleans(), st.sampled_from([1, 3]))
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    return Program(
        rank, draw(st.integers(1, 3)), draw(st.integers(3, 6 if rank < 3 else 4)), tuple(draw(st.lists(step, min_size=1, max_size=3))),
        draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from(["one", "one", "tuple", "dict"])), draw(st.integers(0, 10**6)),
    )  # fmt: skip
