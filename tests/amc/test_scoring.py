"""Fast scoring against the network that it stands for: same outputs as the built module, in every form a network comes in."""

import copy
import itertools

import pytest
import torch
from marks import few
from pruning_nets import shared
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rmprune.amc.scoring import Scorer, ScoringSettings, importance_order
from rmprune.amc.space import Limits, Space
from rmprune.errors import UnsupportedModel
from rmprune.pruning.find_groups import find_structure
from rmprune.pruning.importance import magnitude
from rmprune.pruning.layers import macs
from rmprune.pruning.program import read_program

SHAPE = (3, 8, 8)


def conv(cin: int, cout: int, kernel: int = 1, groups: int = 1, stride: int = 1, bias: bool = False) -> list[nn.Module]:
    return [
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(cout),
        nn.ReLU6(inplace=True),
    ]


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, 10)]


def v1() -> nn.Module:
    return nn.Sequential(
        *conv(3, 8, 3), *conv(8, 8, 3, groups=8), *conv(8, 12), *conv(12, 12, 3, groups=12, stride=2), *conv(12, 16),
        *head(16),
    )  # fmt: skip


def plain3x3() -> nn.Module:
    """An RM'd ResNet's shape: 3x3 throughout, biases and batch norms, features flattened with their positions."""
    return nn.Sequential(
        *conv(3, 8, 3, bias=True), *conv(8, 12, 3, stride=2, bias=True), *conv(12, 8, 3, stride=2),
        nn.Flatten(), nn.Linear(8 * 4, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10),
    )  # fmt: skip


def grouped() -> nn.Module:
    """Groups, and a depthwise layer with two filters for each channel, as RM makes of narrow inverted residuals."""
    return nn.Sequential(
        *conv(3, 8), *conv(8, 12, 3, groups=2), nn.PReLU(12), *conv(12, 24, 3, groups=12), *conv(24, 8), *head(8)
    )


class Residual(nn.Module):
    """Inverted residuals and a pre-activation block (a batch norm that stands alone) on one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, 8, 3))
        self.a = nn.Sequential(*conv(8, 12), *conv(12, 12, 3, groups=12), nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8))
        self.b = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), *conv(8, 12, 3), nn.Conv2d(12, 8, 3, padding=1))
        self.head = nn.Sequential(*head(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        x += self.b(x)
        return self.head(x)


NETWORKS = {"v1": v1, "plain3x3": plain3x3, "grouped": grouped, "residual": Residual, "shared": shared}


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 - 1


CALIBRATION, VALIDATION = images(60, 1), images(50, 2)


def network(name: str, *, calibrated: bool = True) -> nn.Module:
    """A network with random batch norms; calibrated: their statistics are those of the calibration images."""
    torch.manual_seed(3)
    model = NETWORKS[name]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0.5)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return calibrate(model) if calibrated else model.eval()


def calibrate(model: nn.Module) -> nn.Module:
    """Set every batch norm's statistics to those of the calibration images (biased variance), layer after layer."""
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for _ in norms:  # each pass makes one more layer right

        def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            dims = [d for d in range(inputs[0].dim()) if d != 1]
            module.running_mean = inputs[0].mean(dims)
            module.running_var = inputs[0].var(dims, correction=0)

        handles = [norm.register_forward_pre_hook(measure) for norm in norms]
        with torch.no_grad():
            model(CALIBRATION)
        for handle in handles:
            handle.remove()
    return model


def space(model: nn.Module) -> Space:
    return Space(find_structure(model, CALIBRATION[:2]), macs, 1e12, Limits(multiple=2))


def scorer(model: nn.Module, **settings) -> Scorer:  # type: ignore[no-untyped-def]
    found = space(model)
    order = importance_order(magnitude(model, found.structure))
    labels = torch.arange(50) % 10
    return Scorer(
        model, found, order, CALIBRATION, VALIDATION, labels, ScoringSettings(dtype=torch.float64, **settings)
    )


def policies(found: Space) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [found.execute(torch.rand(len(found.groups), generator=generator).tolist()) for _ in range(3)]
    return [found.whole, found.lowest, *drawn]


def folded(model: nn.Sequential) -> nn.Sequential:
    """The same chain with its batch norms in weights and biases."""
    layers: list[nn.Module] = []
    for module in copy.deepcopy(model):
        if isinstance(module, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], module)
        else:
            layers.append(module)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("reconstruct", few([False, True], True))
@pytest.mark.parametrize("name", NETWORKS)
def test_scored_and_built_networks_are_the_same(name: str, reconstruct: bool) -> None:
    fast = scorer(network(name, calibrated=False), reconstruct=reconstruct, chunk=16)
    for widths in policies(fast.space):
        built = fast.build(widths)
        expected = built(VALIDATION)
        torch.testing.assert_close(fast.outputs(widths), expected, rtol=1e-9, atol=1e-9)
        right = (expected.argmax(1) == torch.arange(50) % 10).double().mean()
        assert fast.accuracy(widths) == pytest.approx(float(right))
        sizes = {group.name: width for group, width in zip(fast.space.groups, widths, strict=True)}
        keep = fast.space.keep(widths, fast.order)
        assert fast.space.structure.shrunk(keep).units == sizes
        assert sum(p.numel() for p in built.parameters()) <= sum(p.numel() for p in fast.model.parameters())


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "shared"])  # whose norm sees two maps
def test_the_unpruned_network_is_itself(name: str) -> None:
    """Where the statistics are those of the calibration images, recalibration changes nothing."""
    model = network(name)
    fast = scorer(model)
    torch.testing.assert_close(fast.outputs(fast.space.whole), model(VALIDATION).detach(), rtol=1e-9, atol=1e-9)


def test_a_folded_network_is_recalibrated_as_with_batch_norms() -> None:
    model = network("v1")
    with_norms, without = scorer(model), scorer(folded(model))
    widths = (*with_norms.space.uniform()[:1], 8, 10)
    keep = with_norms.order
    without.order = {
        group.name: keep[other.name] for group, other in zip(without.space.groups, with_norms.space.groups, strict=True)
    }
    torch.testing.assert_close(without.outputs(widths), with_norms.outputs(widths), rtol=1e-4, atol=1e-4)


def test_recalibration_matters() -> None:
    """The test above could not fail if pruned statistics were those of the whole network anyway."""
    fast = scorer(network("v1"))
    keep = fast.space.keep(fast.space.lowest, fast.order)
    from rmprune.pruning.surgery import shrink

    only_cut = shrink(fast.model, keep, fast.space.structure)[0]
    assert (only_cut(VALIDATION) - fast.outputs(fast.space.lowest)).abs().max() > 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_the_cache_of_what_no_policy_changes(name: str) -> None:
    """Same outputs with and without it, and scoring (in-place activations, +=) leaves it as it was."""
    model = network(name, calibrated=False)
    cached, plain = scorer(model), scorer(model, cache_bytes=0)
    assert [op.name for op in plain.program.frontier] == [plain.program.ops[0].name]
    assert cached.program.frontier != plain.program.frontier
    for widths in (cached.space.whole, *policies(cached.space)):
        torch.testing.assert_close(cached.outputs(widths), plain.outputs(widths), rtol=1e-9, atol=1e-9)


def test_the_stem_and_the_depthwise_layer_behind_it_are_cached() -> None:
    fast = scorer(network("v1"))
    (front,) = fast.program.frontier
    assert front.origin == "3"  # the depthwise layer
    layers = [op.layer for op in fast.program.ops if not op.static and op.kind == "layer"]
    assert layers == ["6", "9", "12", "18"]


def test_the_model_is_left_alone() -> None:
    model = network("residual", calibrated=False)
    before = copy.deepcopy(model.state_dict())
    fast = scorer(model, reconstruct=True)
    fast.accuracy(fast.space.lowest)
    with torch.no_grad():
        fast.build(fast.space.lowest).get_parameter("head.3.weight").zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert fast.outputs(fast.space.lowest).abs().sum() > 0


@pytest.mark.parametrize("name", ["plain3x3", "v1"])
def test_reconstruction_brings_outputs_nearer(name: str) -> None:
    model = network(name)
    expected = model(VALIDATION).detach()
    found = space(model)
    order = importance_order(magnitude(model, found.structure))
    widths = tuple(max(w for w in allowed if w <= 0.75 * allowed[-1]) for allowed in found.allowed)
    errors = {}
    for on in (False, True):
        settings = ScoringSettings(dtype=torch.float64, reconstruct=on)
        fast = Scorer(model, found, order, images(600, 4), VALIDATION, torch.zeros(50), settings)
        errors[on] = (fast.outputs(widths) - expected).square().mean().item()
    assert errors[True] < 0.75 * errors[False]


def test_bfloat16_is_near() -> None:
    model = network("v1").float()
    found = space(network("v1"))
    order = importance_order(magnitude(model, found.structure))
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        fast = Scorer(
            model, found, order, CALIBRATION.float(), VALIDATION.float(), torch.zeros(50), ScoringSettings(dtype=dtype)
        )
        outputs.append(fast.outputs(found.lowest))
        assert outputs[-1].dtype == torch.float32
    scale = outputs[0].std()
    assert 0 < (outputs[0] - outputs[1]).abs().mean() < 0.05 * scale


def test_the_more_important_channels_stay() -> None:
    scores = {"a": torch.tensor([0.1, 0.9, 0.9, 0.3])}
    assert importance_order(scores)["a"].tolist() == [1, 2, 3, 0]


def test_what_cannot_be_read_is_refused_by_name() -> None:
    class TwoInputs(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    structure = space(network("v1")).structure
    with pytest.raises(UnsupportedModel, match="takes an input 'y'"):
        read_program(TwoInputs(), structure, CALIBRATION)
    with pytest.raises(UnsupportedModel, match="LayerNorm"):
        read_program(nn.Sequential(nn.Conv2d(3, 8, 1), nn.LayerNorm([8, 8, 8])), structure, CALIBRATION)
    assert all(
        a.name != b.name for a, b in itertools.combinations(read_program(network("v1"), structure, CALIBRATION).ops, 2)
    )
