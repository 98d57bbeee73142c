"""The proximal pull on scales, which scales it meets, and scales on shortcuts."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_nets import CONFIG, blobs, tiny_net

from rmprune.config import SparsityConfig, TrainConfig
from rmprune.errors import ConfigError, UnsupportedModel
from rmprune.models.families import create
from rmprune.training import TrainState, fit
from rmprune.training.optimizer import learning_rate, make_optimizer, parameter_groups, total_learning_rate
from rmprune.training.sparsity import (
    ProximalL1,
    add_shortcut_scales,
    batch_norm_scales,
    shortcut_scales,
    soft_threshold_,
)


def fraction_zero(scales: Mapping[str, Tensor]) -> float:
    """The share of scales that are exactly 0."""
    return sum(int((scale == 0).sum()) for scale in scales.values()) / sum(scale.numel() for scale in scales.values())


def random_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
    return model


def idle_run(strength: float, config: TrainConfig, start: float = 1.0, steps_per_epoch: int = 391) -> Tensor:
    """A scale after a run in which only the penalty moves it."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    nn.init.constant_(model[1].weight, start)
    total = config.epochs * steps_per_epoch
    state = TrainState(
        model,
        make_optimizer(model, config),
        config,
        steps_per_epoch,
        total,
        total_learning_rate(config, steps_per_epoch),
    )
    hook = ProximalL1(SparsityConfig(strength=strength))
    for step in range(total):
        state.learning_rate = learning_rate(config, step, steps_per_epoch)
        state.step = step + 1
        hook(state)
    return model[1].weight.detach()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("epochs", [1, 7])
def test_strength_one_takes_an_idle_scale_from_one_to_exactly_zero(schedule: str, epochs: int):
    config = TrainConfig(epochs=epochs, schedule=schedule, warmup_epochs=0.5)
    assert torch.equal(idle_run(1.0, config), torch.zeros(2))
    torch.testing.assert_close(idle_run(0.5, config), torch.full((2,), 0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(idle_run(1.0, config, start=-1.25), torch.full((2,), -0.25), atol=1e-3, rtol=0)
    assert torch.equal(idle_run(0.0, config), torch.ones(2))


def test_soft_threshold():
    scale = torch.tensor([-0.3, -0.1, 0.0, 0.05, 0.4], dtype=torch.float64)
    soft_threshold_({"": scale}, 0.1)
    torch.testing.assert_close(scale, torch.tensor([-0.2, 0, 0, 0, 0.3], dtype=torch.float64))
    assert fraction_zero({"": scale}) == 0.6


def test_which_scales():
    model = create("resnet8", num_classes=10, width=4)
    every, inner = batch_norm_scales(model), batch_norm_scales(model, "inner")
    assert set(inner) == {f"layer{i}.0.bn1.weight" for i in (1, 2, 3)}
    assert len(every) == 1 + 3 * 2 + 2 and all(name.endswith("weight") for name in every)
    assert every["bn1.weight"] is model.bn1.weight
    with pytest.raises(ConfigError, match="scales"):
        batch_norm_scales(model, "outer")  # type: ignore[arg-type]


def test_bottlenecks_have_two_inner_scales_and_a_stem_that_only_convolutions_read():
    inner = batch_norm_scales(create("resnet50", width=4), "inner")
    assert len(inner) == 2 * 16 + 1 and not any("bn3" in name or "downsample" in name for name in inner)


class OwnNorm(nn.BatchNorm2d):
    """Batch norm as a function, as timm's with an activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        training = bool(self.training)
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training))


class OwnConv(nn.Conv2d):
    """Asks for sizes, as timm's with the padding of TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[2] > 1 else 2 * x)


class OwnNorms(nn.Module):
    """A block of such layers, the norms `called` or their weights given to a function; `idle` is in no use."""

    def __init__(self, *, called: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = (OwnConv(3, 3, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2, self.idle = (OwnNorm(3) for _ in range(3))
        self.called = called

    def norm(self, of: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return of(x) if self.called else F.batch_norm(x, of.running_mean, of.running_var, of.weight, of.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.bn2, self.conv2(self.norm(self.bn1, self.conv1(x))))


@pytest.mark.parametrize("called", [True, False])
def test_norms_among_layers_of_others_are_told_apart(called: bool):
    assert set(batch_norm_scales(OwnNorms(called=called), "inner")) == {"bn1.weight"}


def test_norms_of_others_train_on_under_scales_on_shortcuts():
    model, x = OwnNorms(called=True).eval(), torch.randn(4, 3, 5, 5)
    scaled = add_shortcut_scales(model, x)
    assert "bn2.weight" in batch_norm_scales(scaled) and torch.equal(scaled(x), model(x))
    assert torch.equal(scaled.train()(x), model.train()(x)) and scaled.bn2.running_mean.any()


def test_inner_needs_a_traceable_model():
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedModel, match="cannot trace"):
        batch_norm_scales(Branching(), "inner")


def test_a_model_without_scales_is_refused():
    model, config = nn.Conv2d(1, 1, 1), TrainConfig()
    state = TrainState(model, make_optimizer(model, config), config, 1, 1, 1.0, 1, 0.1)
    with pytest.raises(UnsupportedModel, match="no batch-norm scales"):
        ProximalL1(SparsityConfig(strength=1.0))(state)


@pytest.mark.parametrize(("name", "count"), [("resnet14", 4), ("resnet18", 5)])
def test_shortcut_scales_leave_the_function_alone(name: str, count: int):
    model = random_statistics(create(name, num_classes=10, width=4)).double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    scaled = add_shortcut_scales(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(scaled.state_dict()[key], value) for key, value in before.items())
    assert scaled.training
    torch.testing.assert_close(scaled.eval()(x), model.eval()(x), rtol=0, atol=0)
    scales = shortcut_scales(scaled)
    assert len(scales) == count and "layer1.1.shortcut_scale.weight" in scales
    for path, module in scaled.named_modules():
        if path.endswith("shortcut_scale"):
            assert type(module) is nn.Conv2d and module.groups == module.in_channels and module.bias is None
    # the scale acts on the shortcut alone: with 0 in it, the block is its branch
    with torch.no_grad():
        scales["layer1.1.shortcut_scale.weight"].zero_()
    block = model.get_submodule("layer1.1")
    y = torch.randn(2, 4, 8, 8, dtype=torch.float64).relu()
    seen = {}
    scaled.get_submodule("layer1.1.bn2").register_forward_hook(lambda m, i, o: seen.update(branch=o))
    outputs = []
    for node in scaled.graph.nodes:
        if node.name == "layer1_1_shortcut_scale":
            outputs.append(node)
    assert len(outputs) == 1 and len(outputs[0].users) == 1
    assert block(y).shape == y.shape


def test_shortcut_scales_are_pulled_and_not_decayed():
    model = add_shortcut_scales(create("resnet14", num_classes=10, width=4), torch.randn(1, 3, 8, 8))
    config = TrainConfig()
    free = {id(p) for group in parameter_groups(model, 1e-3) if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(p) in free for p in shortcut_scales(model).values())
    state = TrainState(model, make_optimizer(model, config), config, 1, 1, 0.1, 1, 0.1)
    ProximalL1(SparsityConfig(strength=1.0))(state)
    assert fraction_zero(shortcut_scales(model)) == 1 and fraction_zero(batch_norm_scales(model)) == 1


def test_no_identity_shortcut_is_an_error():
    with pytest.raises(UnsupportedModel, match="no identity shortcut"):
        add_shortcut_scales(nn.Sequential(nn.Conv2d(3, 3, 1)), torch.randn(1, 3, 4, 4))


def test_sparse_training_yields_exact_zeros():
    sparse = fit(tiny_net(), blobs(), CONFIG, seed=0, hook=ProximalL1(SparsityConfig(strength=1.3)))
    dense = fit(tiny_net(), blobs(), CONFIG, seed=0)
    assert fraction_zero(batch_norm_scales(sparse)) > 0.2 > fraction_zero(batch_norm_scales(dense)) == 0


def test_a_scale_on_a_shortcut_mixes_nothing() -> None:
    model, x = create("resnet8", num_classes=10, in_channels=1, width=4), torch.randn(2, 1, 8, 8)
    before = set(batch_norm_scales(model, "inner"))
    assert set(batch_norm_scales(add_shortcut_scales(model, x), "inner")) == before
