"""Distillation: the student follows, and a teacher is asked once about the same images."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_nets import CONFIG, Stop, blobs, same, tiny_net

from rmprune.config import DataConfig
from rmprune.errors import ConfigError
from rmprune.training import fit
from rmprune.training.objective import class_objective, own_objective
from rmprune.training.teacher import distillation_loss


def test_distillation_follows_the_teacher():
    data, config = blobs(), dataclasses.replace(CONFIG, distillation=1.0, epochs=6)
    teacher = tiny_net()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    before = copy.deepcopy(teacher)
    student = fit(tiny_net(0.0), data, config, seed=0, teacher=teacher)
    assert same(teacher, before) and teacher.training

    def distance(model: nn.Module) -> float:
        x = data.test.example(40)
        with torch.no_grad():
            return float(distillation_loss(model.eval()(x), before.eval()(x), 4.0))

    assert distance(student) < 0.5 * distance(fit(tiny_net(0.0), data, CONFIG, seed=0))
    with pytest.raises(ConfigError, match="no teacher"):
        fit(tiny_net(), data, config, seed=0)


class Asked(nn.Sequential):
    """A teacher that counts, over all its copies, about which batches it is asked; two images show in which order of memory it works."""

    times = 0

    def forward(self, x: Tensor) -> Tensor:
        Asked.times += len(x) > 2
        return super().forward(x)


@pytest.mark.long
def test_a_teacher_is_asked_once_about_the_batches_of_a_seed(tmp_path: Path):
    data, config = blobs(), dataclasses.replace(CONFIG, distillation=0.5)
    teacher, memory = Asked(*tiny_net()), tmp_path / "memory"

    def train(**changed: Any) -> tuple[nn.Module, int]:
        Asked.times = 0
        settings: dict[str, Any] = {"data": data, "seed": 0, "teacher": teacher, "teacher_memory": memory} | changed
        return fit(tiny_net(), config=config, **settings), Asked.times

    alone, _ = train(teacher_memory=None)
    first, all_of_them = train()
    again, none = train()
    assert same(alone, first) and same(alone, again)
    assert (all_of_them, none) == (15, 0) and len(list(memory.iterdir())) == 3
    assert train(seed=1)[1] == 15
    assert train(data=blobs(DataConfig(batch_size=16, augment=False)))[1] == 15
    teacher[0].weight.data += 1
    assert train()[1] == 15


def test_a_damaged_or_unfinished_memory_of_a_teacher_is_made_anew(tmp_path: Path):
    data, config = blobs(), dataclasses.replace(CONFIG, distillation=0.5)
    settings: dict[str, Any] = {"seed": 0, "teacher": Asked(*tiny_net()), "teacher_memory": tmp_path / "memory"}
    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_net(), data, config, hook=Stop(7), checkpoint=path, **settings)
    (kept,) = (tmp_path / "memory").iterdir()  # the first epoch; the second was interrupted
    kept.write_bytes(b"damaged")
    whole = fit(tiny_net(), data, config, **settings)
    assert len(list((tmp_path / "memory").iterdir())) == 3 and kept.read_bytes() != b"damaged"
    Asked.times = 0
    assert same(fit(tiny_net(), data, config, checkpoint=path, **settings), whole) and Asked.times == 0


def test_distillation_loss_is_zero_for_equals_and_scales_with_temperature():
    logits, other = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert abs(float(distillation_loss(logits, logits, 4.0))) < 1e-6
    p, q = (other / 2).softmax(1), (logits / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(logits, other, 2.0), expected, check_dtype=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{"distillation": 0.5}, {"label_smoothing": 0.3}, {"distillation": 1.0}])
def test_an_images_whole_loss_counts_by_its_class(settings: dict[str, float]) -> None:
    logits, targets = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    y, weights = torch.tensor([0, 0, 0, 0, 1, 2]), torch.tensor([0.5, 2.0, 2.0])
    asked = dataclasses.replace(CONFIG, **{"distillation": 0.0, **settings})
    target = targets if asked.distillation else None
    plain, weighed = (
        torch.autograd.grad(class_objective(nn.Identity(), logits, y, target, asked, own)[0], logits)[0]
        for own in (None, weights)
    )
    torch.testing.assert_close(weighed, weights[y][:, None] * plain)


def test_a_loss_and_networks_that_write_over_what_they_get_change_nothing() -> None:
    """Sigmoid in place on the outputs, normalisation in place of the images: the teacher hears and says what it did without."""

    class Net(nn.Sequential):
        def __init__(self, over: bool) -> None:
            torch.manual_seed(0)
            super().__init__(nn.Flatten(), nn.Linear(12, 4))
            self.over = over

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5).mul_(3) if self.over else (x - 0.5) * 3)

    batch, config = (torch.randn(8, 3, 2, 2), torch.rand(8, 4)), dataclasses.replace(CONFIG, distillation=0.5)
    before, found = [x.clone() for x in batch], []
    for over in (False, True):

        def loss(model: nn.Module, own: Any, over: bool = over) -> Tensor:
            x = own[0].add_(1) if over else own[0] + 1
            said = model(x)
            return nn.functional.mse_loss(said.sigmoid_() if over else said.sigmoid(), own[1])

        net = Net(over)
        teacher = copy.deepcopy(net)
        nn.init.ones_(teacher[1].weight)
        value, _ = own_objective(net, batch, loss, teacher, config)
        value.backward()
        found.append([value.detach(), *(p.grad for p in net.parameters())])
    assert all(map(torch.equal, batch, before))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
