"""The public calls of removal: what comes out, what is left alone, what is refused."""

import collections

import pytest
import torch
import torchvision
from removal_nets import (
    Residual,
    basic,
    conv,
    conv_bn,
    has_addition,
    images,
    prepared,
    small_resnet,
    worst_error,
)
from torch import Tensor, fx, nn

from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.models import create
from rmprune.pruning.carry_out import carry_out_blocks
from rmprune.removal import plan_removal, remove_residuals


def test_basic_blocks_become_a_flat_sequential_of_stock_modules() -> None:
    model = small_resnet()
    removal = remove_residuals(model, images())
    assert type(removal.model) is nn.Sequential
    assert removal.removed == ["3", "4"] and removal.kept == {}
    assert not has_addition(removal.model) and has_addition(model)
    kinds = {type(module) for module in removal.model}
    assert kinds == {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}
    assert removal.max_error < 1e-13 and worst_error(removal, model) < 1e-12


def test_widths_are_those_of_the_paper() -> None:
    """W1' has C + H rows and the merge reads C + H channels; the strided block reserves its C_in inputs, not its C_out outputs."""
    widths = [
        (m.in_channels, m.out_channels)
        for m in remove_residuals(small_resnet(), images()).model
        if isinstance(m, nn.Conv2d)
    ]
    assert widths == [(3, 6), (6, 12), (12, 6), (6, 14), (14, 8)]


def test_names_tell_the_block() -> None:
    model = create("resnet18", num_classes=3, width=8)
    removal = remove_residuals(model.eval(), torch.randn(2, 3, 32, 32))
    names = [name for name, _ in removal.model.named_children()]
    assert removal.removed == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert names[:10] == [
        "conv1", "bn1", "relu", "maxpool", "layer1_0_conv1", "layer1_0_bn1", "layer1_0_relu", "layer1_0_conv2", "layer1_0_bn2",
        "layer1_0_relu_1",
    ]  # fmt: skip
    x = torch.randn(2, 3, 32, 32)
    assert (removal.model(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()


def test_the_source_is_left_alone() -> None:
    model = small_resnet().float().train()
    model[0].weight.requires_grad_(True)
    calls: list[object] = []
    model[3].register_forward_hook(lambda module, args, output: calls.append(args[0].dtype))
    before = collections.OrderedDict((k, v.clone()) for k, v in model.state_dict().items())
    x = images().float()
    given = x.clone()
    remove_residuals(model, x)
    assert torch.equal(x, given)
    assert (
        model.training
        and model[3].training
        and model[0].weight.requires_grad
        and not model[3].branch[0].weight.requires_grad
    )
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
    assert len(model[3]._forward_hooks) == 1 and not any(len(m._forward_hooks) for m in model[3].branch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_memory_format_are_kept(dtype: torch.dtype) -> None:
    model = small_resnet().to(dtype).to(memory_format=torch.channels_last)
    result = remove_residuals(model, images().to(dtype)).model
    assert {p.dtype for p in result.parameters()} == {dtype} and all(p.requires_grad for p in result.parameters())
    wide = [p for p in result.parameters() if p.dim() == 4 and min(p.shape) > 1]
    assert wide and all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)
    assert not any(module.training for module in result.modules())


def test_no_two_tensors_share_memory() -> None:
    shared = conv(6, 6)
    model = prepared(*conv_bn(3, 6), nn.ReLU(), Residual(nn.Sequential(shared, nn.ReLU(), shared)), nn.ReLU(), shared)
    removal = remove_residuals(model, images(), batch_norm=False)
    pointers = [p.data_ptr() for p in removal.model.parameters()]
    assert len(set(pointers)) == len(pointers) and worst_error(removal, model) < 1e-12


def test_keep_leaves_blocks_in() -> None:
    model = small_resnet()
    removal = remove_residuals(model, images(), keep=["3"])
    assert removal.removed == ["4"] and list(removal.kept) == ["3"] and has_addition(removal.model)
    assert isinstance(removal.model, fx.GraphModule) and worst_error(removal, model) < 1e-12
    with pytest.raises(ConfigError, match=r"names no residual: layer9; there are 3, 4"):
        remove_residuals(model, images(), keep="layer9")


@pytest.mark.parametrize("setting", [{"ranges": "guessed"}, {"form": "clamp"}, {"fuse": "maybe"}, {"tolerance": 0.0}, {"tolerance": "x"},
                                     {"margin": -1.0}, {"margin": "x"}, {"input_range": 3}, {"input_range": (1.0,)}])  # fmt: skip
def test_unknown_settings(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        remove_residuals(small_resnet(), images(), **setting)  # type: ignore[arg-type]


def test_nothing_to_remove_is_an_error() -> None:
    with pytest.raises(UnsupportedModel, match="no residual to remove"):
        remove_residuals(prepared(*conv_bn(3, 6), nn.ReLU(), *conv_bn(6, 6)), images())
    gate = nn.Sequential(*conv_bn(3, 3), nn.Tanh(), *conv_bn(3, 3))
    with pytest.raises(
        UnsupportedModel, match=r"no residual to remove that can go: 0: its activation is nowhere the identity"
    ):
        remove_residuals(prepared(Residual(gate)), images())


def test_networks_without_residuals_say_so() -> None:
    """VGG and DenseNet: nothing to remove, and nothing kept either."""
    vgg = nn.Sequential(*torchvision.models.vgg.make_layers([8, "M", 16, "M"], batch_norm=True)).eval()
    densenet = torchvision.models.DenseNet(4, (2, 2), 8, 2, num_classes=3).eval()
    for model in (vgg, densenet):
        assert plan_removal(model, torch.randn(1, 3, 32, 32)) == []
        with pytest.raises(UnsupportedModel, match="there is no residual to remove"):
            remove_residuals(model, torch.randn(1, 3, 32, 32))


def test_blocks_of_a_flat_graph_are_named_after_their_layers() -> None:
    """A loaded artifact has no modules around its layers."""
    model = create("resnet18", num_classes=3, width=8).eval()
    x = torch.randn(2, 3, 32, 32)
    flat = remove_residuals(model, x, keep=["layer1.0", "layer2.0"]).model
    assert [block.name for block in plan_removal(flat, x)] == ["layer1_0", "layer2_0"]
    assert remove_residuals(flat, x, keep=["layer2_0"]).removed == ["layer1_0"]


def test_untraceable_networks_are_refused_with_the_way_out() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedModel, match=r"torch.fx cannot trace Sequential"):
        remove_residuals(prepared(Branching()), images())
    with pytest.raises(UnsupportedModel, match=r"fails on inputs of shape"):
        remove_residuals(small_resnet(), images(channels=5))


def test_batch_norms_can_be_folded_away() -> None:
    model = small_resnet()
    removal = remove_residuals(model, images(), batch_norm=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in removal.model.modules())
    assert worst_error(removal, model) < 1e-12


def test_training_mode_starts_where_the_network_stands() -> None:
    """RM.md 4, row 3: with mean 0 and variance 1 the first training step computed another function (0.5 on 1.3)."""
    model = small_resnet().float().train()
    x = images(count=64).float()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average over all of x, layer after layer
            module.reset_running_stats()
    model(x)
    expected = model.eval()(x)
    result = remove_residuals(model, x).model
    assert (result.eval()(x) - expected).abs().max() < 1e-5
    assert (result.train()(x) - expected).abs().max() < 2e-2 * expected.abs().max()


def test_measured_batch_norms_are_the_identity_in_both_modes() -> None:
    """Without a batch norm of its own, every row is measured: training mode equals eval mode on the same images."""
    model = prepared(conv(3, 6), nn.ReLU(), Residual(nn.Sequential(conv(6, 6), nn.ReLU(), conv(6, 6))), nn.ReLU())
    x = images(count=16)
    result = remove_residuals(model, x).model
    assert sum(isinstance(m, nn.BatchNorm2d) for m in result) == 2
    assert (result.train()(x) - model(x)).abs().max() < 1e-10


def test_own_batch_norm_rows_are_kept_for_pruning() -> None:
    model = small_resnet()
    scale = model[3].branch[1].weight
    scale[2] = 0.0
    result = dict(remove_residuals(model, images()).model.named_children())
    assert torch.equal(result["3_branch_1"].weight[:6], scale) and torch.equal(
        result["3_branch_0"].weight[:6], model[3].branch[0].weight
    )


def test_several_inputs_and_named_outputs() -> None:
    class Twofold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.block = conv(3, 6), conv(1, 6), basic()

        def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
            y = torch.relu(self.first(x) + self.second(mask))
            return {"features": self.block(y), "mask": mask}

    model = prepared(Twofold())[0]
    x, mask = images(), images(1)
    removal = remove_residuals(model, (x, mask))
    assert removal.removed == ["block"] and list(removal.kept) == ["add"]
    expected, found = model(x, mask), removal.model(x, mask)
    assert found.keys() == expected.keys() and (found["features"] - expected["features"]).abs().max() < 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_is_kept() -> None:
    model = small_resnet().cuda()
    removal = remove_residuals(model, images().cuda())
    assert {p.device.type for p in removal.model.parameters()} == {"cuda"}


def test_pools_that_differ_in_a_hidden_setting_stay_two() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.body = nn.Conv2d(4, 4, 3, padding=1)
            self.inner = nn.AvgPool2d(3, 1, 1)
            self.outer = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return torch.cat([self.body(x) + x, self.inner(x), self.outer(x)], 1)

    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    removal = remove_residuals(Net().eval(), x)
    assert removal.max_error < 1e-12


class Learned(nn.Module):
    """A gain, a shift and a divisor that are trained, one that is not, and scores times a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 6), nn.ReLU())
        self.block, self.fc = basic(), nn.Linear(6, 5)
        self.gain, self.shift = nn.Parameter(torch.rand(1, 6, 1, 1) + 0.5), nn.Parameter(torch.rand(6, 1, 1))
        self.divisor, self.temperature = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
        self.register_buffer("fixed", torch.rand(6, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = torch.relu(x * self.gain + self.shift).tanh() / self.divisor
        return self.fc((x.tanh() * self.fixed).mean((2, 3))) * self.temperature


def test_numbers_that_are_trained_go_on_being_trained() -> None:
    model = prepared(Learned())
    removal = remove_residuals(model, images())
    assert removal.removed and worst_error(removal, model) < 1e-12
    free = {tuple(p.shape) for n, p in removal.model.named_parameters() if not n.endswith(("weight", "bias"))}
    assert sum(p.dim() != 4 and not n.endswith(("weight", "bias")) for n, p in removal.model.named_parameters()) == 4
    assert free == {(6, 1, 1), (1,)}
    fixed = model[0].fixed
    assert any(torch.allclose(b.flatten(), fixed.flatten()) for b in removal.model.buffers() if b.numel() == 6)
    removal.model(images()).sum().backward()
    assert all(p.grad is not None for p in removal.model.parameters())


class Dropping(nn.Module):
    """On maps, by a call, with a block, and in the head, by two of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 6), nn.ReLU(), nn.Dropout2d(0.1))
        self.block = Residual(
            nn.Sequential(*conv_bn(6, 6), torchvision.ops.StochasticDepth(0.2, "row")), after=nn.ReLU()
        )
        self.off, self.first, self.second = nn.Dropout(0.0), nn.Dropout(0.3, inplace=True), nn.Dropout(0.3)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.off(self.block(self.stem(x))), 0.4, self.training).mean((2, 3))
        return self.fc(torch.cat([self.first(x * 1.0), self.second(x)], 1))


def test_dropout_of_a_head_stays_and_what_goes_is_said() -> None:
    model = prepared(Dropping())
    removal = remove_residuals(model, images(), dropout=True)
    assert removal.removed == ["0.block"] and worst_error(removal, model) < 1e-12
    kept = [module for module in removal.model.modules() if isinstance(module, nn.Dropout)]
    assert [module.p for module in kept] == [0.3, 0.3] and not any(module.training or module.inplace for module in kept)
    told = removal.note.partition("drops at random in training is left out (")[2]
    assert told.split(")")[0].split("; ") == ["0.block.branch.2", "0.dropout", "0.stem.3"]
    without = remove_residuals(model, images())
    assert not any(isinstance(module, nn.Dropout) for module in without.model.modules())
    assert "0.first; 0.second" in without.note and "0.off" not in without.note
    assert "drops" not in remove_residuals(small_resnet(), images()).note
    merged, _ = carry_out_blocks(model, {"0.block": "merge"}, lambda count: images(count=count))
    assert [module.p for module in merged.modules() if isinstance(module, nn.Dropout)] == [0.3, 0.3]


class Widened(nn.Module):
    """A map of one channel times a number for each of six, or divided by it."""

    def __init__(self, divided: bool) -> None:
        super().__init__()
        self.stem, self.block = nn.Sequential(*conv_bn(3, 6), nn.ReLU()), basic()
        self.one, self.gain, self.divided = conv(6, 1, 1), nn.Parameter(torch.rand(1, 6, 1, 1) + 0.5), divided
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        seen = torch.sigmoid(self.one(x))
        x = x + (seen / self.gain if self.divided else seen * self.gain)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("divided", [False, True])
def test_a_map_of_one_channel_that_numbers_widen(divided: bool) -> None:
    model = prepared(Widened(divided))
    removal = remove_residuals(model, images())
    assert "0.block" in removal.removed and worst_error(removal, model) < 1e-12
    assert [block.name for block in plan_removal(model, images())]
