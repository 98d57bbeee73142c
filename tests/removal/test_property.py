"""Property of RM: on any residual network the result equals the original, or the call refuses. Never a wrong output.

`RMPRUNE_PROPERTY_DRAWS=2000 pytest tests/removal/test_property.py` draws as many of both kinds, with `--hypothesis-seed` others; the
default ends in seconds. A failing draw prints its spec: `Network(spec)` of tests/random_networks.py builds it again, or
`ProgramNetwork(program)` of tests/random_programs.py.
"""

import operator
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from marks import draws
from random_networks import Act, Block, Conv, Network, Shortcut, Spec, specs
from random_programs import Program, ProgramNetwork, Step, programs
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_leaves

from rmprune.errors import UnsupportedModel
from rmprune.removal import Removal, remove_residuals

ASKED = os.environ.get("RMPRUNE_PROPERTY_DRAWS")
DRAWS = int(ASKED or draws(8, 4))
TOLERANCE = 1e-9
OPTIONS = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {
            "form": st.sampled_from(["auto", "shift", "pair"]),
            "fuse": st.sampled_from(["cheaper", "always", "never"]),
            "batch_norm": st.booleans(),
        }
    ),
)
ADDITIONS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
ADDITION_METHODS = {"add", "add_", "sub", "sub_"}


def inputs(spec: Spec) -> list[Tensor]:
    """Ordinary, saturating, one-sided and constant inputs that the call has not seen."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    shape = (3, spec.channels, *spec.size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [noise, 40 * noise, -noise.abs(), 5 + noise, torch.zeros_like(noise), torch.full_like(noise, -7.0)]


def additions(model: nn.Module) -> int:
    """Additions of two tensors in the traced graph."""
    graph = model.graph if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model).graph
    return sum(
        (node.target in ADDITIONS if node.op == "call_function" else node.target in ADDITION_METHODS)
        and sum(isinstance(arg, fx.Node) for arg in node.args) > 1
        for node in graph.nodes
        if node.op in ("call_function", "call_method")
    )


def runs_on(model: nn.Module, x: Tensor) -> bool:
    """Whether the original itself runs on this size, without additions that broadcast.

    Average pools with ceil_mode are exact where their windows divide the map, as in the size shown; no other size is asked for.
    """
    if any(isinstance(module, nn.AvgPool2d) and module.ceil_mode for module in model.modules()):
        return False
    try:
        model(x.clone())
    except (RuntimeError, ValueError):
        return False
    graph = fx.symbolic_trace(model)
    ShapeProp(graph).propagate(x.clone())
    sums = [node for node in graph.graph.nodes if node.target in ADDITIONS | ADDITION_METHODS]
    shapes = [[a.meta["tensor_meta"].shape for a in node.args if isinstance(a, fx.Node)] for node in sums]
    return all(len(set(operands)) == 1 for operands in shapes)


def other_sizes(spec: Spec) -> list[Tensor]:
    """Inputs of other sizes than the call was shown."""
    generator = torch.Generator().manual_seed(spec.seed + 3)
    height, width = spec.size
    sizes = [(height + 1, width), (height + 2, width + 3)]
    return [10 * torch.randn(1, spec.channels, *size, generator=generator, dtype=torch.float64) for size in sizes]


def assert_equal(removal: Removal, x: Tensor, expected: Tensor) -> None:
    got = removal.model(x.clone())
    assert got.shape == expected.shape, f"shape {got.shape} for {expected.shape} on inputs of {x.shape}"
    error, scale = (got - expected).abs().max(), expected.abs().max()
    assert error <= TOLERANCE * scale + 1e-12, (
        f"wrong output: error {error:.3g} at scale {scale:.3g} on inputs of {tuple(x.shape)}; removed {removal.removed}, "
        f"forms {[getattr(block, 'form', None) for block in removal.blocks]}"
    )


def check(spec: Spec, **options: Any) -> str:
    """Removes what can be removed from the spec's network and checks every promise; what happened, in a word."""
    original, source = Network(spec), Network(spec)
    examples = [x.clone() for x in inputs(spec)]
    try:
        expected = [original(x.clone()) for x in examples]
    except ValueError:  # an instance norm of one pixel
        return "no network"
    if not all(y.isfinite().all() for y in expected):
        return "not finite"
    generator = torch.Generator().manual_seed(spec.seed + 2)
    given_input = torch.randn(2, spec.channels, *spec.size, generator=generator, dtype=torch.float64)
    kept_input = given_input.clone()
    source.train()
    try:
        removal = remove_residuals(source, given_input, **options)
    except UnsupportedModel:  # NotEquivalent is a failure: a wrong rewrite that only the call's own check caught
        return "refused"
    assert removal.removed, "nothing was removed, and no error says so"
    assert all(removal.kept.values()), "a block is kept without a reason"
    assert source.training, "the source's mode changed"
    assert torch.equal(given_input, kept_input), "the given input changed"
    for name, value in source.state_dict().items():
        assert torch.equal(value, original.state_dict()[name]), f"the source's {name} changed"
    assert not any(module.training for module in removal.model.modules())
    left = additions(removal.model)
    assert left <= additions(original) - len(removal.removed), f"{left} additions are left, removed: {removal.removed}"
    for x, y in zip(examples, expected, strict=True):
        assert_equal(removal, x, y)
    for x in other_sizes(spec):
        if runs_on(original, x):
            assert_equal(removal, x, original(x.clone()))
    return "removed" if not removal.kept else "partly"


MANY = settings(
    max_examples=DRAWS, deadline=None, derandomize=not ASKED, database=None, suppress_health_check=list(HealthCheck)
)


def check_program(program: Program, **options: Any) -> str:
    """As `check`, for several inputs and outputs: removed is exact, refused is untouched, every reason names its block."""
    original, source = ProgramNetwork(program), ProgramNetwork(program)
    modules = {name: id(module) for name, module in source.named_modules()}
    x = program.images(2, 1)
    given_inputs = tuple(one.clone() for one in x)
    try:
        removal = remove_residuals(source, given_inputs, **options)
    except UnsupportedModel as error:
        removal = None
        assert len(str(error)) > 20, f"a refusal without a reason: {error}"
    assert {name: id(module) for name, module in source.named_modules()} == modules, "the source's modules changed"
    assert all(torch.equal(one, other) for one, other in zip(x, given_inputs, strict=True)), "the given inputs changed"
    for name, value in source.state_dict().items():
        assert torch.equal(value, original.state_dict()[name]), f"the source's {name} changed"
    if removal is None:
        return "refused"
    assert removal.removed and all(removal.kept.values())
    for seed, scale in ((2, 1.0), (3, 40.0), (4, 0.0)):
        fresh = tuple(scale * one for one in program.images(3, seed))
        expected, got = (tree_leaves(net(*(one.clone() for one in fresh))) for net in (original, removal.model))
        for a, b in zip(expected, got, strict=True):
            assert a.shape == b.shape
            error, largest = (a - b).abs().max(), a.abs().max()
            assert error <= TOLERANCE * largest + 1e-12, (
                f"wrong output: {error:.3g} at scale {largest:.3g}; removed {removal.removed}"
            )
    return "removed" if not removal.kept else "partly"


@MANY
@given(specs(), OPTIONS)
def test_exact_or_refused(spec: Spec, options: dict[str, Any]) -> None:
    event(check(spec, **options))


@MANY
@given(programs(), OPTIONS)
def test_wider_networks_are_exact_or_refused(program: Program, options: dict[str, Any]) -> None:
    event(check_program(program, **options))


@pytest.mark.parametrize("kind", ["chain", "deep", "gate", "shared"])
def test_wider_blocks_are_removed(kind: str) -> None:
    """The generator's vocabulary includes what must be removed, with two outputs and two inputs, whose sum stays."""
    assert check_program(Program(2, 2, 4, (Step(kind),), inputs=2, outputs="tuple")) == "partly"


@pytest.mark.parametrize("kind", ["alias", "trap"])
def test_an_addition_in_place_under_another_name_is_exact(kind: str) -> None:
    """torch.fx alone takes `y += z` for `y = y + z`, and gives other readers of y the old value."""
    program = Program(2, 2, 4, (Step(kind),))
    assert check_program(program) == "removed"


def test_inputs_after_named_ones_are_refused_by_name() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor, *more: Tensor) -> Tensor:
            x = self.a(x) + more[0]
            return self.b(x) + x

    with pytest.raises(UnsupportedModel, match=r"forward takes x and \*more, .*write each input by its name"):
        remove_residuals(Mixed(), (torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)))


def residual(*branch: Conv, **settings: object) -> Block:
    return Block(branch=branch, **settings)  # type: ignore[arg-type]


THREE = Conv(4, (3, 3), padding=(1, 1), act=Act("relu"))
LINEAR = Conv(4, (3, 3), padding=(1, 1))
STEM = Conv(4, (3, 3), padding=(1, 1), act=Act("relu"))


@pytest.mark.parametrize(
    "block",
    [
        residual(THREE, LINEAR, act=Act("relu")),
        residual(THREE, LINEAR, act=Act("relu"), add="iadd"),
        residual(Conv(6, act=Act("relu6")), Conv(6, (3, 3), padding=(1, 1), groups=6, act=Act("relu6")), Conv(4)),
        residual(
            Conv(6, (3, 3), (2, 2), (1, 1), act=Act("relu")),
            Conv(4),
            shortcut=Shortcut("conv", Conv(4, (1, 1), (2, 2))),
        ),
    ],
    ids=["basic", "in-place add", "inverted", "equal width, stride 2"],
)
def test_common_blocks_are_removed(block: Block) -> None:
    """The generator's vocabulary includes what must be removed: a core that refuses everything fails here."""
    stem = STEM if block.branch[0].act.kind == "relu" else Conv(4, (3, 3), padding=(1, 1), act=Act("relu6"))
    assert check(Spec(channels=3, size=(7, 7), parts=(stem, block), scale=4.0)) == "removed"
