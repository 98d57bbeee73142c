"""Equivalence of two networks on given inputs and on random ones that saturate activations: in float64, and in the dtype of the
result. Rewrites nothing."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmprune.errors import NotEquivalent, RmpruneError, UnsupportedModel
from rmprune.graph.build import destination_of
from rmprune.graph.copied import copied
from rmprune.graph.double import in_double
from rmprune.graph.foreign import eval_copy, has_hooks, reference_copy
from rmprune.graph.network import Network, shape_of
from rmprune.graph.normalise import normalise
from rmprune.graph.randomness import RANDOM
from rmprune.graph.relative_error import Comparison, comparison_inputs, depends, double_tensors, relative_error
from rmprune.graph.run import on_copies, run
from rmprune.graph.tensors import floating_tensors


def maps_error(
    reference: nn.Module, network: Network, comparison: Comparison, build: Callable[[Network, tuple[Tensor, ...]], Any]
) -> tuple[float, str]:
    """The relative error of the deepest maps that the inputs change, and their names; for outputs that hardly depend on the inputs.

    Compared are maps (N, C, H, W) that both graphs have: what `reference` gives for them, and what `network`, made of it by
    rewriting, does. Convolutions and batch norms are left out, since fusing moves what lies between them.
    `build`: a network and inputs -> its outputs in float64.
    """
    checked, other = comparison.inputs, comparison.base_inputs
    before = normalise(reference, checked)
    kept = {node.name: (shape_of(node) or ())[1:] for node in network.graph.nodes}
    maps = [node for node in before.graph.nodes if _is_map(before, node)]
    shared = [node.name for node in maps if kept.get(node.name) == (shape_of(node) or ())[1:]]
    two = tuple(torch.cat([x[-1:], y]) for x, y in zip(checked, other, strict=True))
    seen = build(_with_outputs(before, shared), two)
    dependent = {name for name, value in zip(shared, seen, strict=True) if depends(value.reshape(2, -1), None)}
    deepest: list[str] = []
    above: set[fx.Node] = set()
    for node in reversed(before.graph.nodes):
        if any(user in above for user in node.users) or node.name in dependent:
            deepest += [] if any(user in above for user in node.users) else [node.name]
            above.add(node)
    if not deepest:
        return 0.0, ""
    expected, base = (build(_with_outputs(before, deepest), x) for x in (checked, other))
    found = build(_with_outputs(network, deepest), checked)
    return relative_error(expected, found, comparison.groups, base), ", ".join(deepest)


def _is_map(network: Network, node: fx.Node) -> bool:
    linear = isinstance(network.layer(node), nn.Conv2d | nn.BatchNorm2d)
    return node.op in ("call_module", "call_function", "call_method") and not linear and len(shape_of(node) or ()) == 4


def _with_outputs(network: Network, names: list[str]) -> Network:
    """The same layers, up to the nodes of these names, which are what it returns, in this order."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(network.graph, copies)
    by_name = {node.name: copied for node, copied in copies.items()}
    graph.output(tuple(by_name[name] for name in names))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return Network(graph, network.layers, network.constants)


_ROUNDINGS = 16  # carrying copies through a clipping activation costs some


@torch.no_grad()
def own_dtype_error(
    model: nn.Module, result: nn.Module, comparison: Comparison, tolerance: float
) -> tuple[float | None, str]:
    """The relative error of `result` in its own dtype and device, on the first and last image, and what was not compared, if so.

    Raises NotEquivalent where it is over 16 times the original's own rounding (`model` in the same dtype against its float64
    outputs), over the cube root of the dtype's epsilon (5e-3 in float32, 0.1 in float16) and over `tolerance`.
    """
    destination, twin, worst = destination_of(model), eval_copy(model), None
    base, count = comparison.base, sum(comparison.groups)
    for k in sorted({0, count - 1}):
        image = [
            x[k : k + 1].to(destination.device, destination.dtype if x.is_floating_point() else None)
            for x in comparison.inputs
        ]
        # What does not hold image after image is compared as a whole: the original is off by as much.
        wanted = [
            t[k * len(one) : (k + 1) * len(one)] if t.dim() and len(t) == count * len(one) else t
            for t, one in zip(double_tensors(comparison.expected), double_tensors(base), strict=False)
        ]
        try:
            own, found = (relative_error(wanted, on_copies(module, *image), [1], base) for module in (twin, result))
        except RuntimeError as error:
            refuse_stuck(twin, result, image)
            return None, f"not compared in {destination.dtype} on {destination.device}, where it does not run: {error}"
        if math.isinf(own):
            continue
        worst = max(worst or 0.0, found)
        if not found <= max(_ROUNDINGS * own, torch.finfo(destination.dtype).eps ** (1 / 3), tolerance):
            raise NotEquivalent(
                f"in {destination.dtype} the new network is off by {found:.1e} of what the inputs change in the outputs, the original "
                f"itself by {own:.1e}; in float64 they agree. What the new channels carry does not fit {destination.dtype}: try "
                "form='pair' or batch_norm=False, or use the network in a wider dtype"
            )
    unsaid = f"not compared in {destination.dtype}, where the outputs of the original itself are not finite"
    return worst, unsaid if worst is None else ""


@torch.no_grad()
def refuse_stuck(model: nn.Module, result: nn.Module, image: Iterable[Tensor]) -> None:
    """Raises NotEquivalent where `result` fails on an image, in its own dtype, on which `model` runs."""
    given = list(image)
    for module in (model, result):
        try:
            on_copies(module, *given)
        except RuntimeError as error:
            if module is model:
                return
            raise NotEquivalent(
                f"the new network, all in {destination_of(result).dtype}, does not run ({error}); the original does, whose layers are of "
                "several dtypes: give it in one, without casts in forward"
            ) from error


_UNSEEN = "the network does something that torch.fx does not see, such as writing into y.conj() or y.as_strided(...); write it out of place"


@torch.no_grad()
def refuse_changing_hooks(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Hooks are no part of what is read. Raises UnsupportedModel for one that changes what the network returns; it is run once to see."""
    if not has_hooks(model):
        return
    one, _ = comparison_inputs(inputs, 1, 0)
    hooked = copied(model).cpu().double().eval()
    try:
        error = relative_error(in_double(reference_copy(model), one), in_double(hooked, one), [len(one[0])])
    except Exception as failed:  # what a hook does is the user's code
        raise UnsupportedModel(f"a forward hook fails on the first example ({failed}); take the hook off") from failed
    if not error <= 1e-12:
        raise UnsupportedModel(
            "a forward hook changes what the network returns; take the hook off, or write it into forward"
        )


@torch.no_grad()
def refuse_unseen(model: nn.Module, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    """Raises UnsupportedModel where the graph that was read is not what `model` computes of the first of these inputs, in float64."""
    checked, groups = comparison_inputs(inputs, 1, 0)
    twin = reference_copy(model)
    if not relative_error(in_double(twin, checked), _as_read(twin, checked), groups) <= tolerance:
        raise UnsupportedModel(_UNSEEN)


def _as_read(twin: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What the graph that is read of a network gives for these inputs."""
    network = normalise(twin, inputs)
    value = None
    for _, value in run(network.graph, inputs, network.value):  # noqa: B007
        pass
    return value


_DRAWS = 3  # draws of roundings: one alone may cancel
_COMPARABLE = 0.1  # of the error: then the network's own rounding explains it


@torch.no_grad()
def over_tolerance(
    model: nn.Module, comparison: Comparison, error: float, tolerance: float, calibrated: bool = False, where: str = "the outputs"
) -> RmpruneError:  # fmt: skip
    """The error to raise for a result that is off by `error` of what the inputs change in the outputs, or `where` it was compared."""
    twin = reference_copy(model)
    if not comparison.error(in_double(twin, comparison.inputs)) <= tolerance:
        return UnsupportedModel(RANDOM)
    if not comparison.error(_as_read(twin, comparison.inputs)) <= tolerance:
        return UnsupportedModel(_UNSEEN)
    said = f"the new network is off by {error:.1e} of what the inputs change in {where}, over the tolerance of {tolerance:.0e}; "
    own = own_rounding(twin, comparison)
    if own >= _COMPARABLE * error:
        return NotEquivalent(
            f"{said}the original itself is no more certain: one float64 rounding of its weights changes its output by {own:.1e} "
            "of that (variances of batch norms near zero do that). Pass a tolerance above it if that is meant"
        )
    if calibrated:
        return NotEquivalent(
            f"{said}ranges='calibrated' is exact only on inputs like the examples: raise margin, or take ranges='provable'"
        )
    return NotEquivalent(f"{said}a fault")


def own_rounding(reference: nn.Module, comparison: Comparison) -> float:
    """The largest relative change of the outputs, of a few draws, when every weight and statistic moves to a neighbouring float64."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    moving = list(floating_tensors(reference))
    for tensor in moving:
        if 0 in tensor.stride():  # expanded: one number in memory for many, which must move one by one
            tensor.data = tensor.contiguous()
    for _ in range(_DRAWS):
        ups = [torch.rand(tensor.shape, generator=generator) < 0.5 for tensor in moving]
        before = [tensor.clone() for tensor in moving]
        for tensor, up in zip(moving, ups, strict=True):
            tensor.copy_(torch.nextafter(tensor, torch.where(up, math.inf, -math.inf).to(tensor)))
        worst = max(worst, comparison.error(in_double(reference, comparison.inputs)))
        for tensor, own in zip(moving, before, strict=True):
            tensor.copy_(own)
    return worst
