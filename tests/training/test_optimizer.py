"""The optimizer: what decays, the schedule, and one step written out by hand."""

import dataclasses

import pytest
import torch
from torch import nn
from training_nets import CONFIG, blobs, tiny_net

from rmprune.config import DataConfig, TrainConfig
from rmprune.models.families import create
from rmprune.training import fit, make_optimizer
from rmprune.training.optimizer import learning_rate, parameter_groups, total_learning_rate


def test_biases_and_norms_do_not_decay():
    model = create("resnet8", num_classes=2, width=4)
    decayed, free = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {"conv1", "conv2", "0", "fc"}
    assert all("bn" in names[id(p)] or names[id(p)].endswith((".bias", "downsample.1.weight")) for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 2


def test_the_head_learns_faster():
    model = tiny_net(dropout=0.0)
    slow = dataclasses.replace(CONFIG, epochs=1, learning_rate=1e-4, momentum=0.0, weight_decay=0.0, warmup_epochs=0.0)
    plain, faster = (
        fit(model, blobs(), dataclasses.replace(slow, head_rate=rate), seed=0).state_dict() for rate in (1.0, 4.0)
    )
    before = model.state_dict()
    for name, factor in (("0.weight", 1), ("9.weight", 4)):
        moved, further = (float((after[name] - before[name]).norm()) for after in (plain, faster))
        assert further == pytest.approx(factor * moved, rel=0.05)


def test_momentum_may_lie_in_another_memory_order():
    """A hook that slices momentum need not keep the order; torch's fused SGD would step wrongly without a word."""
    results = []
    for order in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        model = nn.Conv2d(6, 4, 3, bias=False).to(memory_format=torch.channels_last)
        optimizer = make_optimizer(model, CONFIG)
        optimizer.state[model.weight] = {"momentum_buffer": torch.randn(4, 6, 3, 3).contiguous(memory_format=order)}
        model(torch.randn(2, 6, 8, 8)).square().sum().backward()
        optimizer.step()
        results.append(model.weight.detach())
    assert torch.equal(*results)


def test_the_schedule_warms_up_and_ends_low():
    config = TrainConfig(epochs=4, learning_rate=0.2, warmup_epochs=1)
    rates = [learning_rate(config, step, 10) for step in range(40)]
    assert rates[0] == pytest.approx(0.02) and rates[9] == pytest.approx(0.2) == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.002
    assert total_learning_rate(config, 10) == pytest.approx(sum(rates))
    constant = dataclasses.replace(config, schedule="constant", warmup_epochs=0)
    assert {learning_rate(constant, step, 10) for step in range(40)} == {0.2}
    assert learning_rate(dataclasses.replace(config, warmup_epochs=99), 39, 10) == pytest.approx(0.2)


def test_one_step_is_that_of_plain_torch():
    """Against a step written out by hand: loss with smoothing, clipping, Nesterov, decay on convolutions only."""
    data = blobs(DataConfig(batch_size=88, augment=False))
    config = TrainConfig(
        epochs=1, warmup_epochs=0, label_smoothing=0.1, clip_norm=0.05, precision="float32", weight_decay=0.1
    )
    model = tiny_net(0.0)
    trained = fit(model, data, config, seed=0)
    model.train()
    x, y = next(data.train.batches(88, shuffle_seed=0))
    nn.functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 0.05
    for (name, p), q in zip(model.named_parameters(), trained.parameters(), strict=True):
        step = p.grad * 0.05 / (norm + 1e-6) + (0.1 * p.detach() if p.ndim > 1 else 0)
        torch.testing.assert_close(q.detach(), p.detach() - 0.1 * 1.9 * step, atol=2e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
def test_gradients_are_still_those_of_the_loss_after_a_step(weight_decay: float) -> None:
    net = nn.Linear(3, 2)
    optimizer = make_optimizer(net, TrainConfig(weight_decay=weight_decay))
    net(torch.ones(1, 3)).sum().backward()
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), before, strict=True))  # type: ignore[arg-type]
