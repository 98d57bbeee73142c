"""Small networks for the tests of removal: blocks of any branch and shortcut, with batch norms and inputs that show mistakes."""

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from rmprune.errors import UnsupportedModel
from rmprune.graph.build import destination_of, materialise
from rmprune.graph.equivalence import over_tolerance
from rmprune.graph.foreign import reference_copy
from rmprune.graph.fuse import fuse_convolutions, join_norms
from rmprune.graph.normalise import normalise
from rmprune.graph.relative_error import Comparison, comparison_inputs
from rmprune.removal import Removal, remove_residuals


class Residual(nn.Module):
    """after(branch(x) + shortcut(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()
        self.after = after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.branch(x) + self.shortcut(x))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, **rest: object) -> nn.Conv2d:
    rest.setdefault("padding", kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, **rest)  # type: ignore[arg-type]


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, **rest: object
) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, kernel, stride, groups, bias=False, **rest), nn.BatchNorm2d(outputs))


class ThreeWays(nn.Module):
    """RepVGG's block: its second addition cannot go while the first one stays."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point, self.norm = conv_bn(6, 6), conv_bn(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.wide(x) + self.point(x) + self.norm(x))


def basic(width: int = 6, act: Callable[[], nn.Module] = nn.ReLU, outer: bool = True) -> Residual:
    """conv, act, conv, add, act: the block of ResNet-18, or without the last activation."""
    return Residual(
        nn.Sequential(*conv_bn(width, width), act(), *conv_bn(width, width)), None, act() if outer else None
    )


def prepared(*layers: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Sequential:
    """A float64 network in eval mode whose weights and batch-norm statistics are random, weights times `gain`."""
    torch.manual_seed(seed)
    model = nn.Sequential(*layers).double().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, gain * (2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.5)
                nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3)
    return model.requires_grad_(False)


def images(channels: int = 3, size: int = 8, count: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def worst_error(removal: Removal, model: nn.Module, channels: int = 3, size: int = 8) -> float:
    """Largest relative error on ordinary, saturating, negative and constant inputs that removal has not seen."""
    x = images(channels, size, 3, seed=9)
    worst = 0.0
    for each in (x, 50 * x, -x.abs(), torch.zeros_like(x), torch.full_like(x, 9.0)):
        expected = model(each)
        worst = max(worst, ((removal.model(each) - expected).abs().max() / expected.abs().max()).item())
    return worst


def has_addition(model: nn.Module) -> bool:
    graph = model.graph if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model).graph
    return any(node.target in (operator.add, operator.iadd, torch.add) for node in graph.nodes)


def reservations(removal: Removal) -> dict[str, int]:
    return {block.name: block.reserved for block in removal.blocks}


@torch.no_grad()
def fuse_linear(model: nn.Module, x: Tensor, rule: str = "cheaper", *, batch_norm: bool = True) -> nn.Module:
    """`model` with neighbouring convolutions as one, nothing removed: fusing by itself, checked as removal checks."""
    reference = reference_copy(model)
    network = normalise(reference, (x,))
    if not batch_norm:
        join_norms(network)
    fuse_convolutions(network, rule)
    checked, groups = comparison_inputs((x,), len(x), 3)
    comparison = Comparison(checked, groups, reference(*(each.clone() for each in checked)))
    result, found = materialise(network, checked, len(x), destination_of(model), batch_norm)
    error = comparison.error(found)
    if not error <= 1e-10:
        raise over_tolerance(model, comparison, error, 1e-10)
    return result


def fold_batch_norms(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` with the batch norms after its convolutions folded into them, by the passes of removal."""
    return fuse_linear(model, x, "never", batch_norm=False)


def small_resnet(**settings: object) -> nn.Module:
    """Two stages of basic blocks, the second with a strided convolution as shortcut."""
    down = Residual(nn.Sequential(*conv_bn(6, 8, stride=2), nn.ReLU(), *conv_bn(8, 8)), conv_bn(6, 8, 1, 2), nn.ReLU())
    return prepared(
        *conv_bn(3, 6), nn.ReLU(), basic(), down, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), **settings
    )


def removed(model: nn.Module, size: int = 8) -> Removal:
    removal = remove_residuals(model, images(size=size))
    assert not removal.kept and not has_addition(removal.model)
    for other in (size, size + 1, size + 3):
        assert worst_error(removal, model, size=other) < 1e-11
    return removal


def refused(model: nn.Module, why: str, size: int = 8) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        remove_residuals(model, images(size=size))


def stem(width: int = 6) -> list[nn.Module]:
    return [*conv_bn(3, width), nn.ReLU()]


def branch(*layers: nn.Module) -> nn.Sequential:
    """The layers with a ReLU between."""
    chain: list[nn.Module] = []
    for layer in layers:
        chain += [*(layer if isinstance(layer, nn.Sequential) else [layer]), nn.ReLU()]
    return nn.Sequential(*chain[:-1])
