"""The networks whose time `gpu.py` measures: forms of each family, and the same layers without their additions. Measures nothing."""

import copy
import operator

import torch
from torch import fx, nn

import rmprune
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
SHARES = {"mobilenet_v2": (0.75, 0.7, 0.6, 0.5), "timm/efficientnet_lite0": (0.6, 0.5)}
"""Of the fused RM form's MACs (MobileNetV2's: 848 million at 224 pixels), as the paper's V1 forms have; others: the original's MACs."""
READ_AT = 64  # pixels at which networks are rewritten and cut: the result takes any size, and float64 is slow


def forms(name: str, *, quick: bool) -> dict[str, nn.Module]:
    """The original, its RM forms, those of fewer MACs with residuals or without, all in eval mode on the CPU."""
    size = 32 if quick else READ_AT
    x = torch.randn(2, 3, size, size)
    original = made(name, quick)
    found = {"original": original}
    removed = {
        fuse: rmprune.remove_residuals(original, x, fuse=fuse, batch_norm=True).model for fuse in ("never", "always")
    }
    found |= {"RM": removed["never"], "RM fused": removed["always"]}
    plain, large = removed["always"], torch.randn(1, 3, size if quick else 224, size if quick else 224)
    whole, most = rmprune.count_macs(original, large), rmprune.count_macs(plain, large)
    shares = SHARES.get(name, (min(1.0, whole / most),))
    for share in shares[-1:] if quick else shares:
        found[f"RM {share:.2f}"] = cut(plain, share, x)
        equal = of_macs(name, share * most, large, quick)
        found |= {} if equal is None else {f"residual {share:.2f}": equal}
    return found


def made(name: str, quick: bool, width: float | None = None) -> nn.Module:
    """With random weights; in miniature a quarter as wide."""
    torch.manual_seed(0)
    settings = {"num_classes": 10, "width": 0.25 if name == "mobilenet_v2" else 16} if quick else {}
    return rmprune.models.create(name, **settings | ({} if width is None else {"width": width})).eval()


def cut(plain: nn.Module, share: float, x: torch.Tensor) -> nn.Module:
    """The same fraction of every layer's channels, multiples of 8, of this share of its MACs."""
    if share == 1:
        return plain
    budget = Budget(macs_ratio=share, round_to=8)
    return rmprune.prune(
        plain, x, importance="magnitude", budget=budget, which="uniform", compensate=False, prove=False
    )


def of_macs(name: str, macs: float, x: torch.Tensor, quick: bool) -> nn.Module | None:
    """The residual network whose width multiplier gives nearly these MACs; None where it has no multiplier."""
    if not rmprune.models.families.has_multiplier(name):
        return None
    low, high = (0.1, 0.5) if quick else (0.7, 2.0)
    for _ in range(2 if quick else 6):
        width = (low + high) / 2
        low, high = (width, high) if rmprune.count_macs(made(name, quick, width), x) < macs else (low, width)
    return made(name, quick, low)


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
