"""The networks whose time `gpu.py` measures: forms of each family, and the same layers without their additions. Measures nothing."""

import copy
import dataclasses
import functools
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from removal_coverage import randomise
from timm.models import byobnet, efficientnet
from torch import fx, nn

import rmprune
from rmprune.artifact.describe import describe
from rmprune.artifact.rebuild import build
from rmprune.pruning import Budget

FORMATS = (
    ("float64", torch.float64, False),
    ("float32", torch.float32, False),
    ("tf32", torch.float32, True),
    ("bfloat16", torch.bfloat16, False),
    ("float16", torch.float16, False),
)
"""(name, dtype, whether TF32 is allowed)."""
FAMILIES = ("mobilenet_v2", "resnet18", "timm/efficientnet_lite0", "resnet50", "resnet34", "timm/repvgg_a0")
WITH_ADDITIONS = ("mobilenet_v2", "resnet18", "resnet50", "timm/efficientnet_lite0")
SHARES = {
    "mobilenet_v2": (0.755, 0.705, 0.605, 0.505),
    "timm/efficientnet_lite0": (0.605, 0.505),
}
"""Of the fused RM form's MACs (MobileNetV2's: 848 million at 224 pixels), as the paper's V1 forms have; others: the original's MACs where
the RM form has more, else those of the RM form itself."""
READ_AT = 64  # pixels at which networks are rewritten and cut: the result takes any size, and float64 is slow


def write(folder: Path, names: Sequence[str] = FAMILIES, *, quick: bool = False) -> None:
    """The forms of each family as a JSON file without weights, for `forms_in`: a machine that is lent has better things to do."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        described = {form: describe(net) for form, net in forms(name, quick=quick).items()}
        file_of(folder, name).write_text(json.dumps(described))


def forms_in(folder: Path | None, name: str, *, quick: bool) -> dict[str, nn.Module]:
    """The forms that `write` left there, with random weights; where it left none, made now."""
    if folder is None or not file_of(folder, name).exists():
        return forms(name, quick=quick)
    found = {form: build(described) for form, described in json.loads(file_of(folder, name).read_text()).items()}
    size = 32 if quick else READ_AT
    for net in found.values():
        randomise(net, torch.randn(4, 3, size, size), 0)
    return found


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '-')}.json"


def forms(name: str, *, quick: bool) -> dict[str, nn.Module]:
    """The original, its RM forms, those of fewer MACs with residuals or without, all in eval mode on the CPU."""
    size = 32 if quick else READ_AT
    x = torch.randn(2, 3, size, size)
    original = made(name, quick)
    found = {"original": original}
    removed = {
        fuse: rmprune.remove_residuals(original, x, fuse=fuse, batch_norm=True).model for fuse in ("never", "always")
    }
    plain, large = removed["always"], torch.randn(1, 3, size if quick else 224, size if quick else 224)
    whole, most = rmprune.count_macs(original, large), rmprune.count_macs(plain, large)
    found["RM"] = removed["never"]
    if rmprune.count_macs(removed["never"], large) != most:  # else there was nothing to fuse
        found["RM fused"] = plain
    shares = SHARES.get(name, (min(1.0, whole / most),))
    for share in shares[-1:] if quick else shares:
        macs = most
        if share < 1:
            narrow = cut(plain, share, x, unused=1.0 if quick else 0.02)
            macs = rmprune.count_macs(narrow, large)
            found[f"RM {macs / most:.2f}"] = narrow
        if name in SHARES or share == 1:  # else the original is the residual network of these MACs
            found[f"residual {macs / most:.2f}"] = of_macs(name, macs, large, quick)
    return found


def made(name: str, quick: bool, width: float | None = None) -> nn.Module:
    """With random weights, and batch norms as trained ones are: fresh ones need twice the copies. In miniature a quarter as wide."""
    torch.manual_seed(0)
    settings = {"num_classes": 10, "width": 0.25 if name == "mobilenet_v2" else 16} if quick else {}
    model = rmprune.models.create(name, **settings) if width is None else of_width(name, width, quick)
    size = 32 if quick else READ_AT
    randomise(model, torch.randn(4, 3, size, size), 0)
    return model


def cut(plain: nn.Module, share: float, x: torch.Tensor, unused: float) -> nn.Module:
    """The same fraction of every layer's channels, multiples of 8, of this share of its MACs. Where those steps leave more than `unused`
    of all MACs, channels are taken from the next larger such network, by magnitude."""
    whole = rmprune.count_macs(plain, x)
    settings: dict[str, Any] = {"importance": "magnitude", "compensate": False, "prove": False}

    def even(part: float) -> tuple[nn.Module, float]:
        budget = Budget(macs_ratio=part, round_to=8)
        found = rmprune.prune(plain, x, budget=budget, which="uniform", **settings)
        return found, rmprune.count_macs(found, x) / whole

    found, own = even(share)
    if own > share - unused:
        return found
    larger = next(net for net, own in (even(share + step * unused) for step in range(1, 20)) if own > share)
    return rmprune.prune(larger, x, budget=Budget(macs_ratio=share, round_to=8, reference_macs=whole), **settings)


def of_macs(name: str, macs: float, x: torch.Tensor, quick: bool) -> nn.Module:
    """The residual network with all widths multiplied so that it has nearly these MACs."""
    cost = functools.cache(lambda width: rmprune.count_macs(of_width(name, width, quick), x))
    low, high = (0.1, 0.5) if quick else (0.7, 2.0)
    for _ in range(2 if quick else 6):
        width = (low + high) / 2
        low, high = (width, high) if cost(width) < macs else (low, width)
    return made(name, quick, min(low, high, key=lambda width: abs(cost(width) - macs)))


def of_width(name: str, width: float, quick: bool) -> nn.Module:
    """The network with all widths multiplied, in steps of 8. timm has no name for these: its builders are asked."""
    if name == "timm/efficientnet_lite0":
        return efficientnet._gen_efficientnet_lite("efficientnet_lite0", channel_multiplier=width)
    if name.startswith("timm/repvgg"):
        whole = byobnet.model_cfgs[name.removeprefix("timm/")]
        step = lambda channels: 8 * round(width * channels / 8)  # noqa: E731
        blocks = tuple(dataclasses.replace(block, c=step(block.c)) for block in whole.blocks)
        return byobnet.ByobNet(dataclasses.replace(whole, blocks=blocks, stem_chs=step(whole.stem_chs)))
    return rmprune.models.create(name, width=width, **({"num_classes": 10} if quick else {}))


def with_and_without(name: str, *, quick: bool) -> dict[str, nn.Module]:
    """{"with": the network, "without": the same layers without the additions of identity shortcuts}."""
    whole = made(name, quick)
    return {"with": whole, "without": without_additions(whole)}


def without_additions(model: nn.Module) -> nn.Module:
    """A copy in which the branch alone goes on where it was added to what it was computed from."""
    traced = fx.symbolic_trace(copy.deepcopy(model))
    found = 0
    for node in list(traced.graph.nodes):
        if node.target in (operator.add, operator.iadd, torch.add) and len(node.all_input_nodes) == 2:
            first, second = node.all_input_nodes
            branch = first if computed_from(first, second) else second if computed_from(second, first) else None
            if branch is not None:
                node.replace_all_uses_with(branch)
                traced.graph.erase_node(node)
                found += 1
    assert found, "no addition of an identity shortcut"
    traced.recompile()
    return traced.eval()


def computed_from(node: fx.Node, source: fx.Node) -> bool:
    """Whether `source` is among what `node` was computed from."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent is source:
                return True
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return False
